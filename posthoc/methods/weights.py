"""Sampled weight sets of the whole network (or of a subnetwork), served as one mixture.

The samples come from a Laplace posterior that laplace-torch fitted over all weights (Daxberger et
al. 2021, arXiv:2106.14806; subnetworks: Daxberger et al. 2021b, arXiv:2010.14689). The frozen graph
holds S copies of the network behind each other's back, and what the others call features are here
the S copies' outputs, N×(S·C): this page only compares them with the frozen outputs.

Classification is the mixture of the S predictions. Regression: the mean of the samples moves the
frozen mean, and their variance is the epistemic part. Nothing is stored but S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from posthoc.contract import Array, FitError, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="weights",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "weight_samples", "labels"}),
    summary="sampled weights of the whole network or a subnetwork, through laplace-torch",
    paper=Paper(
        "Laplace Redux: Effortless Bayesian Deep Learning", 2021, "https://arxiv.org/abs/2106.14806"
    ),
    preserves=False,
)


class Settings(BaseModel):
    """None here: what is sampled, and how often, is said when the model is opened."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """Counts the samples, and in a regression the noise around their mean (one pass).

    Raises FitError where the features are not the outputs of two copies or more.
    """
    first = next(iter(rows))
    assert first.phi is not None
    samples, left = divmod(first.phi.shape[1], first.z.shape[1])
    if left or samples < 2:
        raise FitError("weights needs the outputs of sampled networks; ask for them with --weights")
    state = State({}, {"task": task, "samples": samples})
    if task == "classification":
        return state
    total, n = np.zeros(first.z.shape[1]), 0
    for block in rows:
        assert block.phi is not None and block.y is not None
        error = np.asarray(block.y, np.float64) - _members(state, block.phi, block.z).mean(1)
        total, n = total + (error**2).sum(0), n + len(block)
    if not np.all(total > 0):
        raise FitError("weights: the model predicts the labels without error; check for leakage")
    return State({}, {**state.settings, "noise_variance": (total / n).tolist()})


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the samples add to the outputs of N rows (float64 definition)."""
    z = np.asarray(z, np.float64)
    deviations = _members(state, phi, z) - z[:, None, :]
    if state.settings["task"] == "classification":
        return Spread(None, draws=deviations - deviations.mean(2, keepdims=True))
    shift = deviations.mean(1)
    fluctuations = deviations - shift[:, None, :]
    return Spread((fluctuations**2).mean(1), draws=fluctuations, shift=shift)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    shape = g.const([0, state.settings["samples"], -1], "int64")
    deviations = g.op("Sub", g.op("Reshape", phi, shape), g.unsqueeze(z, 1))
    if state.settings["task"] == "classification":
        mean = g.reduce("ReduceMean", deviations, 2, keepdims=True)
        return SpreadNames(None, draws=g.op("Sub", deviations, mean))
    shift = g.reduce("ReduceMean", deviations, 1)
    fluctuations = g.op("Sub", deviations, g.unsqueeze(shift, 1))
    variance = g.reduce("ReduceMean", g.op("Mul", fluctuations, fluctuations), 1)
    return SpreadNames(variance, draws=fluctuations, shift=shift)


def _members(state: State, phi: Array, z: Array) -> Array:
    return np.asarray(phi, np.float64).reshape(len(phi), state.settings["samples"], z.shape[1])
