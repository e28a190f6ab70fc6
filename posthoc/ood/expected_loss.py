"""Expected loss: how wrong the small network of `posthoc.methods.loss` says that the model will be.

Classification: the entropy of softmax(z / (T sqrt(v))), in nats, with T the temperature and v the
widening that the network gives the row: the log loss that the widened answer expects of itself.
Regression: the predicted squared error over its mean, averaged over outputs. It tells rows that the
model gets wrong among those like the rows of the fit (Yoo & Kweon 2019, arXiv:1905.03677; Kirchhof
et al. 2024, arXiv:2402.16569); how strange a row is it says only as far as strange rows look hard.

The fit is a fold: the network is trained on a `posthoc.ood.sample` of at most 20,000 rows, in their
order there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.folds import log_softmax
from posthoc.links import entropy
from posthoc.methods.loss import predictor
from posthoc.ood import sample
from posthoc.ood.gaussian import real
from posthoc.ood.sample import Sample

INFO = Info(
    name="expected_loss",
    kind="score",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "labels"}),
    summary="the loss that a small network expects of a row",
    paper=Paper("Pretrained Visual Uncertainties", 2024, "https://arxiv.org/abs/2402.16569"),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
ROWS = 20_000


def init(n_classes: int, n_features: int) -> Sample:
    """No rows."""
    del n_classes, n_features
    return sample.empty(ROWS)


def update(stats: Sample, batch: Features) -> Sample:
    """Add the rows of a batch; FitError without features or labels, or if any is not finite."""
    real(batch, INFO.name)
    if batch.y is None:
        raise FitError("expected_loss needs labels: name their column with --target")
    return sample.add(stats, batch, INFO.name)


def merge(a: Sample, b: Sample) -> Sample:
    """The sample of both."""
    return sample.join(a, b)


def finish(stats: Sample, head: LinearHead | None = None) -> State:
    """The trained network: what `posthoc.methods.loss.predictor.fit` gives on the sample.

    Raises FitError for fewer than 20 rows, for features that are all zero, for labels that are no
    classes of the outputs, and for those that a regressor predicts without error.
    """
    if len(stats) < predictor.FEWEST:
        raise FitError(f"expected_loss needs at least {predictor.FEWEST} rows and has {len(stats)}")
    task: Task = "classification" if stats.y.dtype.kind == "i" else "regression"
    rows = blocks_of.of(stats.rows)
    blocks_of.check(rows, INFO, task)
    return predictor.fit(rows, head, task, predictor.Settings())


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D and outputs N×C or N×K (float64 definition)."""
    v = predictor.spread(state, phi, z).variance
    assert v is not None
    if state.settings["task"] == "regression":
        return np.asarray((v / state.tensors["unit"]).mean(1))
    t = state.settings["temperature"] * np.sqrt(v)
    return np.asarray(entropy(log_softmax(np.asarray(z, np.float64) / t[:, None])))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    v = predictor.emit(g, state, phi, z).variance
    assert v is not None
    if state.settings["task"] == "regression":
        unit = state.tensors["unit"]
        return g.sum(g.op("Mul", v, g.const(1 / (len(unit) * unit))), 1)
    t = g.op("Mul", g.op("Sqrt", v), g.const(state.settings["temperature"]))
    # Less the largest first: outputs far from nought would lose their digits in the division.
    behind = g.op("Sub", z, g.reduce("ReduceMax", z, 1, keepdims=True))
    log_p = g.op("LogSoftmax", g.op("Div", behind, t), axis=1)
    return g.op("Neg", g.sum(g.op("Mul", g.op("Exp", log_p), log_p), 1))
