"""A Student-t last layer: Bayesian linear regression with unknown noise, around the frozen head.

The residuals r_k = y_k - z_k of each output k are modelled as w_k' phi~ + noise, phi~ = (phi, 1),
with a Normal-Inverse-Gamma prior whose mean is the frozen head: w_k | s_k² ~ N(0, s_k² / d I) and
s_k² ~ InvGamma(a0, b0_k). With P = d I + Phi'Phi, shared by all outputs, the posterior is

    m_k = P^-1 Phi'r_k,   a_n = a0 + n / 2,   b_k = b0_k + (r_k'r_k - m_k'P m_k) / 2,

and y_k | phi is Student-t with 2 a_n degrees of freedom, location z_k + m_k'phi~ and squared scale
b_k / a_n (1 + v), v = phi~'P^-1 phi~ (Bernardo & Smith 1994, appendix A.2). It is the last layer
of a scale mixture of Gaussian processes (Lee et al. 2022, arXiv:2107.01408, with an inverse-gamma
scale): its dual with the kernel phi~'phi~ / d says the same. Its variance, which is what is served,
is b_k / (a_n - 1) (1 + v): noise and epistemic part. As d grows, or without rows, the location is
the frozen one.

P^-1 is kept as a square root S S', so that v = |S'phi~|² and `observe` can add rows one at a time.
A graph takes the mean of the features off first, beside which float32 would lose what varies.
Memory of a fit is K² + K C float64 numbers, K = D + 1, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames

INFO = Info(
    name="student_t",
    kind="module",
    tasks=("regression",),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="Student-t last layer around the frozen head: unknown noise, heavier tails, in closed "
    "form",
    paper=Paper(
        "Scale Mixtures of Neural Network Gaussian Processes",
        2022,
        "https://arxiv.org/abs/2107.01408",
    ),
    preserves=False,
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


class Settings(BaseModel):
    """``prior_precision`` d of the weights in units of the noise precision, None: the one that
    maximises the evidence, which is closed in the eigenvalues of Phi'Phi. ``a0`` and ``b0`` of the
    noise variance, the same for every output; the default a0 = 2 weighs as much as four rows, and
    b0 None is a0 times the mean squared residual of each output, so that the expected noise
    precision before any fit is the frozen model's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prior_precision: float | None = Field(default=None, gt=0)
    a0: float = Field(default=2.0, gt=0)
    b0: float | None = Field(default=None, gt=0)


# The searched range of d, in largest eigenvalues of Phi'Phi, and the points of the first look.
RANGE = (1e-10, 1e6)
LOOKS = 65


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over n rows: ``outer`` K×K of phi~phi~', ``cross`` K×C of phi~r' and ``square`` C of
    r², all in float64: the evidence asks about
    directions that are narrow beside the widest."""

    n: int
    outer: F64
    cross: F64
    square: F64


def init(head: LinearHead, task: Task, settings: Settings) -> Stats:
    """The empty statistic."""
    del task, settings
    c, d = head.weight.shape
    return Stats(0, np.zeros((d + 1, d + 1)), np.zeros((d + 1, c)), np.zeros(c))


def update(stats: Stats, batch: Features) -> Stats:
    """Add the rows of a batch."""
    phi, residual = _augmented(batch), _residuals(batch)
    return Stats(
        stats.n + len(batch),
        stats.outer + phi.T @ phi,
        stats.cross + phi.T @ residual,
        stats.square + (residual**2).sum(0),
    )


def merge(a: Stats, b: Stats) -> Stats:
    """The statistic of both sets of rows."""
    return Stats(a.n + b.n, a.outer + b.outer, a.cross + b.cross, a.square + b.square)


def finish(
    stats: Stats, head: LinearHead, settings: Settings, heldout: Features | None = None
) -> State:
    """The posterior.

    Raises FitError for labels that the frozen model predicts without error, and for a0 and so few
    rows that the predictive has no variance.
    """
    del head, heldout
    if not np.all(stats.square > 0):
        raise FitError("student_t: the model predicts the labels without error; check for leakage")
    if settings.a0 + stats.n / 2 <= 1:
        raise FitError(
            f"student_t has no variance with a0 {settings.a0} and {stats.n} rows; raise a0"
        )
    b0 = _b0(stats, settings)
    mu, basis, along = _spectrum(stats)
    d, chosen = settings.prior_precision, "given"
    if d is None:
        d, chosen = _most_evident(stats, mu, along, settings.a0, b0), "evidence"
    shrink = 1.0 / (mu + d)
    root = basis * np.sqrt(shrink)
    left = stats.square - (along**2 * shrink[:, None]).sum(0)
    b = b0 + 0.5 * np.maximum(left, 0.0)  # nothing but rounding where the layer is exact
    said = {
        "prior_precision": float(d),
        "prior_precision_by": chosen,
        "a0": settings.a0,
        "b0": [float(v) for v in b0],
        "rows": stats.n,
    }
    centre = (stats.outer[-1, :-1] / stats.n).astype(np.float32).astype(np.float64)
    mean = basis @ (along * shrink[:, None])
    return _state(centre, root, mean, settings.a0 + stats.n / 2, b, said)


def log_evidence(stats: Stats, prior_precision: float, a0: float, b0: Array) -> float:
    """Log marginal likelihood in nats of all residuals, summed over outputs; ``b0`` C.

    It is the log density of a multivariate Student-t with 2 a0 degrees of freedom, location 0 and
    shape b0 / a0 (I + Phi Phi' / d), in the spectrum of Phi'Phi.
    """
    mu, _, along = _spectrum(stats)
    return float(_evidence(stats, mu, along, a0, np.asarray(b0, np.float64))(prior_precision))


def observe(state: State, rows: Features) -> State:
    """The posterior after more labelled rows, taken one at a time: what a fit on all rows with the
    same prior precision, a0 and b0 gives.

    The square root of P^-1 takes Potter's update (Bierman 1977, "Factorization methods for
    discrete sequential estimation", ch. II): it stays a root of a positive semi-definite matrix
    whatever the rounding. 6 K² operations a row instead of the K³ of a fit; the new state serves
    at once. Raises FitError for rows without labels or features, or not finite.
    """
    if rows.phi is None or rows.y is None:
        raise FitError("student_t observes rows with features and labels")
    phi, residual = _augmented(rows), _residuals(rows)
    if not (np.isfinite(phi).all() and np.isfinite(residual).all()):
        raise FitError("student_t observed a row that is not finite")
    t = state.tensors
    root, mean, b = t["root"].copy(), t["mean"].copy(), t["b"].copy()
    for x, r in zip(phi, residual, strict=True):
        f = x @ root
        total = 1.0 + f @ f
        gain = root @ f
        error = r - x @ mean
        root -= np.outer(gain / (total + np.sqrt(total)), f)
        mean += np.outer(gain / total, error)
        b += 0.5 * error**2 / total
    said = {k: v for k, v in state.settings.items() if k not in ("noise_variance", "df")}
    said["rows"] += len(phi)
    return _state(t["centre"], root, mean, float(t["a"][0]) + len(phi) / 2, b, said)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    del z
    t = state.tensors
    wide = np.concatenate([np.asarray(phi, np.float64), np.ones((len(phi), 1))], 1)
    v = ((wide @ t["root"]) ** 2).sum(1, keepdims=True)
    noise = np.asarray(state.settings["noise_variance"], np.float64)
    return Spread(v * noise, np.sqrt(v), np.diag(np.sqrt(noise)), shift=wide @ t["mean"])


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    del z
    root, mean, centre = (state.tensors[k] for k in ("root", "mean", "centre"))
    phi = g.op("Sub", phi, g.const(centre))

    def project(table: Array) -> str:
        """[phi, 1] @ table, for K×anything."""
        return g.op("Gemm", phi, g.const(table[:-1]), g.const(table[-1] + centre @ table[:-1]))

    projected = project(root)
    v = g.sum(g.op("Mul", projected, projected), 1, keepdims=True)
    noise = np.asarray(state.settings["noise_variance"], np.float64)
    return SpreadNames(
        g.op("Mul", v, g.const(noise[None])),
        g.op("Sqrt", v),
        np.diag(np.sqrt(noise)),
        shift=project(mean),
        equal=True,
    )


def _state(centre: F64, root: F64, mean: F64, a: float, b: F64, said: dict[str, object]) -> State:
    """``centre`` D of the features, ``root`` K×K, ``mean`` K×C, ``a`` 1 and ``b`` C of the
    posterior; the noise variance and the degrees of freedom that a predictive reads are in the
    settings."""
    noise = [float(v) for v in b / (a - 1)]
    return State(
        {"centre": centre, "root": root, "mean": mean, "a": np.asarray([a]), "b": b},
        said | {"noise_variance": noise, "df": 2 * a},
    )


def _augmented(rows: Features) -> F64:
    phi = np.asarray(rows.phi, np.float64)
    return np.concatenate([phi, np.ones((len(phi), 1))], 1)


def _residuals(rows: Features) -> F64:
    return np.asarray(rows.y, np.float64) - np.asarray(rows.z, np.float64)


def _b0(stats: Stats, settings: Settings) -> F64:
    if settings.b0 is not None:
        return np.full(len(stats.square), settings.b0)
    return settings.a0 * stats.square / stats.n


def _spectrum(stats: Stats) -> tuple[F64, F64, F64]:
    """Eigenvalues of Phi'Phi, its basis, and Phi'r in it."""
    mu, basis = np.linalg.eigh(stats.outer)
    along = basis.T @ stats.cross
    # Rounding leaves directions in which no row lies a little of both.
    empty = mu <= len(mu) * np.finfo(np.float64).eps * mu[-1]
    return np.where(empty, 0.0, mu), basis, np.where(empty[:, None], 0.0, along)


def _evidence(stats: Stats, mu: F64, along: F64, a0: float, b0: F64) -> Callable[[float], float]:
    a, c = a0 + stats.n / 2, len(b0)
    fixed = c * (gammaln(a) - gammaln(a0) - 0.5 * stats.n * np.log(2 * np.pi))
    fixed += a0 * np.log(b0).sum()

    def at(d: float) -> float:
        b = b0 + 0.5 * (stats.square - (along**2 / (mu + d)[:, None]).sum(0))
        return float(fixed - 0.5 * c * np.log1p(mu / d).sum() - a * np.log(b).sum())

    return at


def _most_evident(stats: Stats, mu: F64, along: F64, a0: float, b0: F64) -> float:
    """The d of the largest evidence: a look at the whole range, then Brent's method around the
    best. It may end at the upper end, where the rows say nothing against the frozen head."""
    at = _evidence(stats, mu, along, a0, b0)
    low, high = np.log(mu[-1] * np.asarray(RANGE))
    grid = np.linspace(low, high, LOOKS)
    best = int(np.argmax([at(float(np.exp(u))) for u in grid]))
    if best in (0, LOOKS - 1):
        return float(np.exp(grid[best]))
    found = minimize_scalar(
        lambda u: -at(float(np.exp(u))), bounds=(grid[best - 1], grid[best + 1]), method="bounded"
    )
    return float(np.exp(found.x))
