"""DSM-BOCD: Bayesian online change points whose posterior an outlier cannot carry away.

Altamirano, Briol & Knoblauch 2023, arXiv:2302.04759. Within a segment x ~ N(mean, 1/λ), in natural
parameters η = (λ mean, λ). The likelihood is replaced by the diffusion score-matching loss with
weight m(x)² = g = 1/(1 + x²), whose posterior is Gaussian in η::

    precision = precision_0 + 2ω Σ Λ(x)      Λ(x) = g [[1, -x], [-x, x²]]
    precision·mean = precision_0·mean_0 - 2ω Σ ν(x)      ν(x) = (g', -x g' - g)

with g' = -2x g². What an observation adds is bounded, and is the same for every run length. ω sets
how much it counts; it is fitted on the reference, so that the posterior there is the nearest, in
KL(DSM ‖ standard), to the normal-gamma posterior of the Gaussian likelihood.

The predictive density integrates N(x; η₁/η₂, 1/η₂) over that Gaussian truncated to η₂ > 0: over η₁
exactly, ``η₂ N(E[η₁ | η₂]; η₂ x, η₂ + Var[η₁ | η₂])``, over η₂ on a grid. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

from calibration.drift import run_length
from calibration.drift.detector import Found
from calibration.drift.run_length import Settings, State
from calibration.drift.run_length_json import SavedState, dump, load
from calibration.drift.standardise import RELEARN, Observation, reference_of
from posthoc.contract import F64, Array, DataError

NAME = "dsm"
OMEGAS = 1e-3, 10.0  # between which ω is looked for
MOST = 1e3  # of an ω that is given
PRIOR = np.array([1.0, 0.0, 1.0, 0.0, 1.0])  # the statistics of η ~ N((0, 1), identity)
NODES, WIDTH = 8, 3.5  # of the grid over η₂: cells, and standard deviations each side
_MIDDLES = (np.arange(NODES) + 0.5) / NODES
_TINY = 1e-300  # a smaller density counts as this: its logarithm stays finite


@dataclass(frozen=True, slots=True)
class Model:
    """Statistics a dimension, S = 5: ``precision`` 11, 12, 22 and ``precision·mean`` 1, 2.

    ``omega`` D: how much an observation counts; ``given`` is what it was set to, if it was.
    """

    omega: tuple[float, ...]
    given: float | None = None

    def __post_init__(self) -> None:
        given = () if self.given is None else (self.given,)
        wrong = [o for o in self.omega + given if not 0 < o <= MOST]
        if wrong:
            raise DataError(f"omega is {wrong[0]}, not a number above 0 and at most {MOST:g}")

    def prior(self) -> F64:
        return PRIOR

    def updated(self, stats: F64, lengths: Array, z: F64) -> F64:
        del lengths
        return stats + contribution(z, np.array(self.omega))

    def log_density(self, stats: F64, lengths: Array, z: F64) -> F64:
        del lengths
        a, b, l1 = stats[..., 0], stats[..., 1], stats[..., 3]
        eta, weight = nodes(stats)
        variance = eta + 1 / a
        away = eta * (z + b / a) - l1 / a
        density = eta * np.exp(-0.5 * away * away / variance) / np.sqrt(2 * np.pi * variance)
        return np.asarray(np.log(np.maximum((weight * density).sum(axis=0), _TINY)))

    def holds(self, stats: F64) -> bool:
        a, b, c = stats[..., 0], stats[..., 1], stats[..., 2]
        possible = (a > 0) & (a * c > b * b)
        return len(self.omega) == stats.shape[1] and bool(possible.all())


def contribution(z: F64, omega: F64) -> F64:
    """What observations … add to the five statistics, …×5: ``2ω (Λ11, Λ12, Λ22, -ν1, -ν2)``."""
    g = 1 / (1 + z * z)
    slope = -2 * z * g * g
    made = np.empty((*np.shape(z), 5))
    made[..., 0] = g
    made[..., 1] = -g * z
    made[..., 2] = g * z * z
    made[..., 3] = -slope
    made[..., 4] = z * slope + g
    return 2 * omega[..., None] * made


def posterior(stats: F64) -> tuple[F64, F64]:
    """Mean …×2 and covariance …×2×2 of η, before its truncation."""
    a, b, c, l1, l2 = np.moveaxis(stats, -1, 0)
    determinant = a * c - b * b
    mean = np.stack((c * l1 - b * l2, a * l2 - b * l1), axis=-1) / determinant[..., None]
    rows = np.stack((np.stack((c, -b), -1), np.stack((-b, a), -1)), -2)
    return mean, rows / determinant[..., None, None]


def nodes(stats: F64) -> tuple[F64, F64]:
    """Values of η₂, NODES×…, and weights whose sum over them is 1, for its normal law truncated to
    η₂ > 0. They are midpoints of equal cells in √η₂, within WIDTH standard deviations of the mean:
    small η₂ make the tails of the predictive, and are many."""
    a, b, c, l1, l2 = (stats[..., i] for i in range(5))
    determinant = a * c - b * b
    mean, sd = (a * l2 - b * l1) / determinant, np.sqrt(a / determinant)
    low = np.sqrt(np.maximum(mean - WIDTH * sd, 0))
    high = np.sqrt(np.maximum(mean + WIDTH * sd, sd))
    root = low + (high - low) * _MIDDLES.reshape(-1, *(1,) * low.ndim)
    eta = root * root
    away, nearest = (eta - mean) / sd, np.minimum(mean / sd, 0)
    weight = root * np.exp(0.5 * (nearest * nearest - away * away))
    return eta, weight / weight.sum(axis=0)


def fit_omega(z: F64) -> float:
    """ω of one standardised dimension N: argmin KL(DSM ‖ normal-gamma posterior), in η.

    The normal-gamma prior has mean 0, one pseudo-observation, shape and rate 1. In η its posterior
    is η₁ | λ ~ N(u λ, λ/k), λ ~ Gamma(shape, rate).
    """
    n, total = len(z), float(z.sum())
    k, shape = 1.0 + n, 1 + n / 2
    u = total / k
    rate = 1 + 0.5 * (float(z @ z) - k * u * u)
    once = contribution(z, np.ones_like(z)).sum(axis=0)

    def divergence(log_omega: float) -> float:
        stats = PRIOR + np.exp(log_omega) * once
        a, b, l1 = stats[0], stats[1], stats[3]
        eta, weight = nodes(stats)
        _, covariance = posterior(stats)
        away = (l1 - b * eta) / a - u * eta
        log_p = (
            0.5 * np.log(k / (2 * np.pi * eta))
            - 0.5 * k * (away * away + 1 / a) / eta
            + shape * np.log(rate)
            - gammaln(shape)
            + (shape - 1) * np.log(eta)
            - rate * eta
        )
        entropy = 0.5 * np.log(np.linalg.det(covariance)) + 1 + np.log(2 * np.pi)
        return float(-entropy - (weight * log_p).sum())

    found = minimize_scalar(divergence, bounds=np.log(OMEGAS), method="bounded")
    return float(np.exp(found.x))


def start(
    reference: Array,
    *,
    omega: float | None = None,
    hazard: float | Sequence[float] = 1 / 1000,
    keep: int = 50,
    contamination: float = 0.05,
    broad: float = 10.0,
    clip: float = 5.0,
    least: int = 5,
    recent: int = 50,
    threshold: float = 0.98,
    relearn: int = RELEARN,
) -> State[Model]:
    """The state after a reference of N or N×D points, which is its first segment.

    ``omega`` None: fitted on the reference, and anew on every new regime. ``hazard``: the chance
    that a segment ends, or one for each of its lengths from 1, the last also for longer ones. The
    rest as in `run_length.Settings`; ``contamination`` 0 is the paper's own predictive. Raises
    DataError as `run_length.begin`, and for an omega outside (0, 1000].
    """
    fit = partial(_fit, None if omega is None else float(omega))
    settings = Settings(
        keep, float(contamination), float(broad), float(clip), least, recent, threshold, relearn
    )
    return run_length.begin(fit, reference_of(reference), settings, hazard)


def step(state: State[Model], x: Observation) -> tuple[State[Model], Found]:
    """The state after one more observation (a number, or D), and what it showed.

    Raises DataError for NaN and infinity.
    """
    return run_length.step(state, x, partial(_fit, state.model.given))


class _Saved(SavedState[Model]):
    pass


def to_json(state: State[Model]) -> str:
    """The state as one JSON object."""
    return dump(_Saved, NAME, state)


def from_json(text: str) -> State[Model]:
    """The inverse of `to_json`. Raises DataError for anything else."""
    return load(_Saved, NAME, text)


def _fit(given: float | None, z: F64) -> Model:
    return Model(tuple(fit_omega(c) if given is None else given for c in z.T), given)
