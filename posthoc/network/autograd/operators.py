"""Every operator that has a translation."""

from __future__ import annotations

from posthoc.network.autograd import (
    activations,
    creation,
    dense,
    elementwise,
    indexing,
    normalisation,
    pooling,
    reductions,
    resize,
    shapes,
)
from posthoc.network.autograd.node import Table

OPERATORS: Table = {
    **activations.OPERATORS,
    **creation.OPERATORS,
    **dense.OPERATORS,
    **elementwise.OPERATORS,
    **indexing.OPERATORS,
    **normalisation.OPERATORS,
    **pooling.OPERATORS,
    **reductions.OPERATORS,
    **resize.OPERATORS,
    **shapes.OPERATORS,
}
