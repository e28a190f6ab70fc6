"""What the members of a sampled network add to the frozen outputs.

Features are here the members' outputs, N×(S·C). Classification is the mixture of the S predictions;
the frozen label stays unless the module's is asked for. In a regression the frozen mean stays, and
the mean squared distance of the members from it is the epistemic variance. Nothing is stored but S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc.contract import F64, Array, FitError, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def fit(name: str, rows: Rows, task: Task) -> State:
    """Counts the copies, and in a regression the noise about the frozen mean (one pass). Raises
    FitError where the features are not the outputs of two copies or more."""
    first = next(iter(rows))
    assert first.phi is not None
    wide, classes = first.phi.shape[1], first.z.shape[1]
    single = task == "classification" and _single(first.phi, first.z)
    found, left = (wide, 0) if single else divmod(wide, classes)
    if left or found < 2:
        raise FitError(f"{name} needs the outputs of a sampled network as features")
    said: dict[str, Any] = {"task": task, "copies": found, "single": single}
    if task == "classification":
        return State({}, said)
    total, n = np.zeros(classes), 0
    for block in rows:
        error = np.asarray(block.y, np.float64) - block.z
        total, n = total + (error**2).sum(0), n + len(block)
    if not np.all(total > 0):
        raise FitError(f"{name}: the model predicts the labels without error; check for leakage")
    return State({}, {**said, "noise_variance": (total / n).tolist()})


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the members add to the outputs of N rows (float64 definition)."""
    z = np.asarray(z, np.float64)
    apart = _members(state, phi, z) - z[:, None, :]
    if state.settings["task"] == "classification":
        return Spread(None, draws=apart - apart.mean(2, keepdims=True))
    return Spread((apart**2).mean(1), draws=apart)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    members = g.op("Reshape", phi, g.const([0, state.settings["copies"], -1], "int64"))
    if state.settings["single"]:
        members = g.op("Concat", g.op("Mul", members, g.const(0.0)), members, axis=2)
    apart = g.op("Sub", members, g.unsqueeze(z, 1))
    if state.settings["task"] == "classification":
        mean = g.reduce("ReduceMean", apart, 2, keepdims=True)
        return SpreadNames(None, draws=g.op("Sub", apart, mean))
    variance = g.reduce("ReduceMean", g.op("Mul", apart, apart), 1)
    return SpreadNames(variance, draws=apart)


def _members(state: State, phi: Array, z: F64) -> F64:
    found = np.asarray(phi, np.float64).reshape(len(phi), state.settings["copies"], -1)
    if state.settings["single"]:
        found = np.concatenate([np.zeros_like(found), found], 2)
    return found


def _single(phi: Array, z: Array) -> bool:
    """Whether a copy has one logit, that of the second of two classes, the first of which is
    always zero in z. (Where the model itself gives such a zero, its copies do too.)"""
    zero = z.shape[1] == 2 and not z[:, 0].any()
    return zero and (phi.shape[1] % 2 == 1 or bool(phi[:, ::2].any()))
