"""Last-layer Laplace with Kronecker curvature, in closed form from cached features.

For a head f = W phi + b, softmax likelihood and the generalised Gauss-Newton matrix, the curvature
is approximated by U ⊗ A with U = mean of diag(p) - p p' and A = sum of phi phi' (Ritter et al.
2018; Daxberger et al. 2021, arXiv:2106.14806). With eigenvalues lambda of U and mu of A, the
logit covariance of a row is Q_U diag(g) Q_U' where g_j = sum_k (Q_A' phi)_k² / (lambda_j mu_k + d)
and d is the prior precision: no Jacobian, no Cholesky factor, D² + DC + C² multiplications a row.
For regression the curvature is exact: A / sigma_k² for each output k.

Memory of a fit is D² + C² float64 numbers, whatever the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames, per_difference, softmax

INFO = Info(
    name="laplace",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head"}),
    summary="last-layer Laplace, Kronecker-factored curvature, closed form",
    paper=Paper(
        "Laplace Redux: Effortless Bayesian Deep Learning", 2021, "https://arxiv.org/abs/2106.14806"
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


class Settings(BaseModel):
    """``prior_precision`` None maximises the evidence by MacKay's fixed point; ``train_rows``
    rescales the curvature to the rows the network was trained on; ``fold_bias`` appends 1 to the
    features, which keeps the covariance of weights and biases (False: a block of its own, centring
    nothing over classes, as laplace-torch does)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prior_precision: float | None = Field(default=None, gt=0)
    train_rows: int | None = Field(default=None, gt=0)
    fold_bias: bool = True


MAX_STEPS = 1_000
PRECISION_BOUNDS = (1e-8, 1e12)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over rows: ``outer`` K×K of phi~ phi~', ``curvature`` C×C of diag(p) - p p',
    ``squared_error`` C (regression with labels), ``n`` rows, ``labelled`` rows with labels."""

    task: Task
    folded: bool
    n: int
    outer: F64
    curvature: F64
    squared_error: F64
    labelled: int


def init(head: LinearHead, task: Task, settings: Settings) -> Stats:
    """The empty statistic."""
    c, d = head.weight.shape
    k = d + int(settings.fold_bias)
    return Stats(task, settings.fold_bias, 0, np.zeros((k, k)), np.zeros((c, c)), np.zeros(c), 0)


def update(stats: Stats, batch: Features) -> Stats:
    """Add the rows of a batch. Labels are used in regression only."""
    assert batch.phi is not None
    phi = _augment(np.asarray(batch.phi), stats.folded)
    outer = stats.outer + (phi.T @ phi).astype(np.float64)
    if stats.task == "classification":
        p = softmax(batch.z)
        curvature = stats.curvature + np.diag(p.sum(0)) - p.T @ p
        return replace(stats, n=stats.n + len(batch), outer=outer, curvature=curvature)
    if batch.y is None:
        return replace(stats, n=stats.n + len(batch), outer=outer)
    err = np.asarray(batch.y, np.float64).reshape(len(batch), -1) - np.asarray(batch.z, np.float64)
    return replace(
        stats,
        n=stats.n + len(batch),
        outer=outer,
        squared_error=stats.squared_error + (err**2).sum(0),
        labelled=stats.labelled + len(batch),
    )


def merge(a: Stats, b: Stats) -> Stats:
    """The statistic of both sets of rows."""
    return replace(
        a,
        n=a.n + b.n,
        outer=a.outer + b.outer,
        curvature=a.curvature + b.curvature,
        squared_error=a.squared_error + b.squared_error,
        labelled=a.labelled + b.labelled,
    )


def finish(
    stats: Stats, head: LinearHead, settings: Settings, heldout: Features | None = None
) -> State:
    """The posterior.

    Raises FitError for no rows, non-finite statistics, or features that are all zero.
    """
    prior_precision, train_rows = settings.prior_precision, settings.train_rows
    mu, basis = np.linalg.eigh(stats.outer)
    mu = np.maximum(mu, 0.0)
    scale = 1.0 if train_rows is None else train_rows / stats.n
    theta = np.concatenate([head.weight, head.bias[:, None]], 1)
    if stats.task == "classification":
        lam, directions = np.linalg.eigh(stats.curvature / stats.n)
        lam = np.maximum(lam, 0.0)
        if stats.folded:
            # Softmax ignores a common shift of all logits, and so does U: centre both over classes
            # and drop the direction that vanishes.
            theta = theta - theta.mean(0)
            directions = directions - directions.mean(0)
        keep = (directions**2).sum(0) > 1e-9
        curvature = scale * np.multiply.outer(mu, lam[keep])
        directions_t = directions[:, keep].T
        bias_curvature = scale * stats.n * lam[keep]
        noise = None
    else:
        if stats.labelled == 0:
            raise FitError("laplace needs labels for the noise of a regression")
        directions_t = np.eye(len(head.bias))
        curvature, bias_curvature, noise = mu[:, None], np.asarray([scale * stats.n]), None
    if stats.task == "classification":
        precision, steps = (
            (prior_precision, 0)
            if prior_precision
            else _evidence(
                curvature if stats.folded else np.vstack([curvature, bias_curvature]), theta
            )
        )
    else:
        precision, noise, steps = _regression_evidence(
            stats, mu * scale, theta, prior_precision, scale
        )
        curvature = scale * np.divide.outer(mu, noise)
        bias_curvature = scale * stats.n / noise
    floor = np.zeros(curvature.shape[1]) if stats.folded else 1.0 / (bias_curvature + precision)
    tensors: dict[str, Array] = {
        "basis": basis[: head.weight.shape[1]],
        "offset": basis[-1] if stats.folded else np.zeros(len(mu)),
        "shrink": 1.0 / (curvature + precision),
        "floor": floor,
        "directions": directions_t,
    }
    said: dict[str, object] = {
        "task": stats.task,
        "prior_precision": float(precision),
        "fixed_point_steps": steps,
        "rows": stats.n,
        "curvature_rows": stats.n if train_rows is None else train_rows,
        "fold_bias": stats.folded,
    }
    if noise is not None:
        said["noise_variance"] = [float(v) for v in noise]
    return State(tensors, said)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    t = state.tensors
    projected = np.asarray(phi, np.float64) @ t["basis"] + t["offset"]
    g = projected**2 @ t["shrink"] + t["floor"]
    directions = np.asarray(t["directions"], np.float64)
    if state.settings["task"] == "regression":
        return Spread(g, np.sqrt(g), directions)
    return Spread(g @ per_difference(directions), np.sqrt(g), directions)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    projected = g.op("Gemm", phi, g.const(t["basis"]), g.const(t["offset"]))
    variance = g.op("MatMul", g.op("Mul", projected, projected), g.const(t["shrink"]))
    if np.any(t["floor"]):
        variance = g.op("Add", variance, g.const(t["floor"]))
    directions = np.asarray(t["directions"], np.float64)
    amplitude = g.op("Sqrt", variance)
    if state.settings["task"] == "regression":
        return SpreadNames(variance, amplitude, directions)
    mean = per_difference(directions)[:, None]
    return SpreadNames(g.op("MatMul", variance, g.const(mean)), amplitude, directions)


def log_evidence(
    stats: Stats, head: LinearHead, prior_precision: float, log_likelihood: float
) -> float:
    """Log marginal likelihood of a classifier under the Laplace approximation, in nats.

    ``log_likelihood`` is the sum over rows of log p(y) of the frozen model. Immer et al. 2021,
    arXiv:2104.04975, eq. 5.
    """
    mu = np.maximum(np.linalg.eigvalsh(stats.outer), 0.0)
    lam = np.maximum(np.linalg.eigvalsh(stats.curvature / stats.n), 0.0)
    h = np.multiply.outer(mu, lam).ravel()
    if not stats.folded:
        h = np.concatenate([h, stats.n * lam])
    norm = float((head.weight**2).sum() + (head.bias**2).sum())
    log_det = float(np.log1p(h / prior_precision).sum())
    return log_likelihood - 0.5 * (log_det + prior_precision * norm)


def _augment(phi: Array, folded: bool) -> Array:
    # A float16 Gram matrix overflows at a few hundred features.
    phi = phi if phi.dtype in (np.float32, np.float64) else phi.astype(np.float32)
    return np.concatenate([phi, np.ones((len(phi), 1), phi.dtype)], 1) if folded else phi


def _evidence(curvature: F64, theta: F64) -> tuple[float, int]:
    """MacKay's fixed point d = gamma / |theta|², gamma = sum of h / (h + d)."""
    norm = float((theta**2).sum())
    if norm == 0.0:
        raise FitError("laplace: the head's weights are all equal; it predicts nothing")
    d = 1.0
    for step in range(1, MAX_STEPS + 1):
        new = float((curvature / (curvature + d)).sum()) / norm
        new = float(np.clip(new, *PRECISION_BOUNDS))
        if abs(new - d) <= 1e-10 * d:
            return new, step
        d = new
    return d, MAX_STEPS


def _regression_evidence(
    stats: Stats, mu: F64, theta: F64, precision: float | None, scale: float
) -> tuple[float, F64, int]:
    """Prior precision and the noise variance of each output, alternating MacKay's two updates."""
    n = stats.labelled
    noise = np.maximum(stats.squared_error / n, np.finfo(np.float64).tiny)
    if not np.all(stats.squared_error > 0):
        raise FitError("laplace: the model predicts the labels without error; check for leakage")
    d, steps = precision or 1.0, 0
    for step in range(1, MAX_STEPS + 1):
        h = np.divide.outer(mu, noise)
        gamma = (h / (h + d)).sum(0)
        new = precision or float(np.clip(gamma.sum() / (theta**2).sum(), *PRECISION_BOUNDS))
        # Effective parameters count against the rows that they were fitted on; where the network
        # was trained elsewhere (train_rows) the given rows are fresh and lose none.
        dof = np.maximum(n - (gamma if scale == 1.0 else 0.0), 1.0)
        fresh = stats.squared_error / dof
        if abs(new - d) <= 1e-10 * d and np.allclose(fresh, noise, rtol=1e-10, atol=0):
            return new, fresh, step
        d, noise, steps = new, fresh, step
    return d, noise, steps
