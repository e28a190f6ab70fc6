"""ViM, virtual-logit matching (Wang et al., CVPR 2022, arXiv:2203.10807).

score = alpha |R'(phi - u)| - log sum exp z, with u = -pinv(W) b the origin of the logits and R the
directions beyond the principal ones of sum (phi - u)(phi - u)': 1,000 of them where there are 2,048
features or more, 512 from 768 on, else half. alpha makes the residual as large as the largest logit
is: the mean of max z over the root mean square of the residual, which is the square root of the
eigenvalues' sum, so that sums are all that is kept. The paper takes the mean of the residual, which
is smaller by its spread: by 1 to 10 % on the nine classifiers of `bench.suite` with features.

Where residuals are no more than rounding beside the features, alpha would be infinite: it is that
of a residual of LEAST of their distance from the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import centred, gaussian
from posthoc.ood.gaussian import ClassSums

INFO = Info(
    name="vim",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head"}),
    summary="residual beyond the principal features against the logits (ViM)",
    paper=Paper(
        "ViM: Out-Of-Distribution with Virtual-logit Matching",
        2022,
        "https://arxiv.org/abs/2203.10807",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
LEAST = 0.03


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums of features and of the largest logits."""

    features: ClassSums
    largest: float


def init(n_classes: int, n_features: int) -> Stats:
    """No rows."""
    del n_classes
    return Stats(gaussian.empty(1, n_features), 0.0)


def update(stats: Stats, batch: Features) -> Stats:
    """Add the features and outputs of a batch."""
    features = gaussian.add(stats.features, batch, by_class=False, name=INFO.name)
    z = np.asarray(batch.z, np.float64)
    if not np.isfinite(z).all():
        raise FitError("vim met outputs that are not finite; leave out or mend those rows")
    return Stats(features, stats.largest + float(z.max(1).sum()))


def merge(a: Stats, b: Stats) -> Stats:
    """The sums of both."""
    return Stats(gaussian.join(a.features, b.features), a.largest + b.largest)


def principal(width: int) -> int:
    """How many of ``width`` directions are principal, by the rule of the paper."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


def finish(stats: Stats, head: LinearHead | None = None) -> State:
    """The residual directions, times alpha.

    Raises FitError for no rows, constant features and no linear head.
    """
    known, sums = centred.head_of(head, INFO.name), stats.features
    n, square = sums.n, float(np.trace(sums.outer))
    if n == 0:
        raise FitError("vim was given no rows")
    mean = sums.mean
    scatter = sums.outer - n * np.outer(mean, mean)
    spread = float(np.trace(scatter))
    if spread <= gaussian.ROUNDING * square:
        raise FitError(
            "vim: every feature is constant on the given rows; give more rows, or a score of "
            "outputs"
        )
    origin = -np.linalg.pinv(known.weight) @ known.bias
    away = mean - origin
    values, vectors = np.linalg.eigh(scatter / n + np.outer(away, away))
    rest = len(mean) - principal(len(mean))  # eigenvalues ascend
    residual = float(np.sqrt(np.maximum(values[:rest], 0.0).sum()))
    floor = LEAST * float(np.sqrt(spread / n))
    # A head whose largest logit is negative says no less of strangeness by its residual.
    alpha = abs(stats.largest / n) / max(residual, floor)
    centre, basis = gaussian.exact(mean), alpha * vectors[:, :rest]
    return State(
        {"mean": centre, "basis": basis, "offset": (centre - origin) @ basis},
        {"rows": int(n), "principal": len(mean) - rest, "alpha": alpha, "residual": residual},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D and outputs N×C (float64 definition)."""
    t, logits = state.tensors, np.asarray(z, np.float64)
    virtual = (np.asarray(phi, np.float64) - t["mean"]) @ t["basis"] + t["offset"]
    largest = logits.max(1)
    energy = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
    return np.asarray(np.sqrt((virtual * virtual).sum(1)) - energy)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    assert phi is not None
    t = state.tensors
    # Centred first: far from zero a product of features would round what is left of them.
    psi = g.op("Sub", phi, g.const(t["mean"]))
    virtual = g.op("Gemm", psi, g.const(t["basis"]), g.const(t["offset"]))
    length = g.op("Sqrt", g.sum(g.op("Mul", virtual, virtual), 1))
    # log sum exp z = max z - max log softmax z
    surest = g.reduce("ReduceMax", g.op("LogSoftmax", z, axis=1), 1)
    return g.op("Add", g.op("Sub", length, g.reduce("ReduceMax", z, 1)), surest)
