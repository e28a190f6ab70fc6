"""Small rows for tests of refitted heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from posthoc import registry
from posthoc.contract import F64, Features, LinearHead, State, Task
from posthoc.methods.heads.blocks import blocks
from posthoc.rows import of

D, C, N = 4, 3, 90


def frozen(seed: int = 0, *, zero: bool = False) -> LinearHead:
    """A head; ``zero`` predicts nothing, so that a penalty towards it is one towards zero."""
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(C, D)), rng.normal(size=C))
    return LinearHead(0 * head.weight, 0 * head.bias) if zero else head


def classes(head: LinearHead, n: int = N, seed: int = 1) -> Features:
    """Rows in float64 whose labels overlap and do not quite follow the head."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D))
    truth = rng.normal(size=(D, C))
    y = (phi @ truth + rng.gumbel(size=(n, C))).argmax(1)
    return Features(phi, phi @ head.weight.T + head.bias, y)


def values(head: LinearHead, n: int = N, seed: int = 1) -> Features:
    """The same for a regression, noise of another size for each output."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D))
    z = phi @ head.weight.T + head.bias
    y = z + 0.3 * phi @ rng.normal(size=(D, C)) + rng.normal(size=(n, C)) * [0.5, 1.0, 2.0]
    return Features(phi, z, y)


def fit(
    name: str, head: LinearHead, rows: Features, task: Task = "classification", **settings: Any
) -> State:
    """A page fitted through the registry."""
    return registry.fit(name, head, task, of(rows), settings)


def deviations(name: str, state: State, rows: Features) -> F64:
    """Deviations N×S×C of a fitted ensemble of classifiers."""
    draws: F64 = registry.page(name).spread(state, rows.phi, rows.z).draws
    return draws


def first_block(rows: Features) -> Any:
    """The rows as the one block that a fit in float64 sees."""
    (block,) = blocks(of(rows), np.dtype(np.float64))
    return block
