"""Scores of the softmax alone: nothing is fitted but the number of classes. A fold, and 1 - p.

1 - p of the largest class is the sum of the others, so that saturated rows keep their order in
float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Features

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def init(n_classes: int, n_features: int) -> int:
    """The number of classes."""
    del n_features
    return n_classes


def update(stats: int, batch: Features) -> int:
    """Nothing to add."""
    del batch
    return stats


def merge(a: int, b: int) -> int:
    """The same number of classes."""
    del b
    return a


def others(p: F64) -> F64:
    """One minus the first of the probabilities N×C, N numbers."""
    return np.asarray(p[:, 1:].sum(1))


def emit_others(g: Fragment, z: str, classes: int) -> tuple[str, str, str]:
    """(the softmax p N×C of outputs, where the largest is N×C, 1 - p of that N×1)."""
    p = g.op("Softmax", z, axis=-1)
    # The same nodes as the head's own mask of the label, so that the runtime merges the two.
    label = g.unsqueeze(g.op("ArgMax", z, axis=1, keepdims=0), 1)
    first = g.op("Equal", label, g.const(range(classes), "int64"))
    return p, first, g.sum(g.op("Where", first, g.const(0.0), p), 1, keepdims=True)
