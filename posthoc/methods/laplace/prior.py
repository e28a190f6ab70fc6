"""The precision of the prior: by evidence, by held-out likelihood, or without labels.

``Spectrum`` is all that the evidence needs of a posterior, whatever its structure. The other rules
take a function of the precision (`posthoc.methods.laplace.criteria`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, FitError

PRECISION_BOUNDS = (1e-8, 1e12)
MAX_STEPS = 1_000
# Held-out likelihood is often flat over decades of the precision and then says nothing. Of the
# precisions it cannot tell from the best, the smallest is kept, as the largest module strength is
# (`calibration.scaling`): the epistemic share is then the posterior's and not an accident.
FLAT = 5e-4  # nats
_GOLDEN = (5**0.5 - 1) / 2
Criterion = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of the curvature of all parameters (any shape, null ones left out or zero) and
    the squared norm of the parameters."""

    values: F64
    norm: float


def log_evidence(spectrum: Spectrum, precision: float, log_likelihood: float) -> float:
    """Log marginal likelihood under the Laplace approximation, in nats.

    ``log_likelihood`` is the sum over rows of log p(y) of the frozen model. Immer et al. 2021,
    arXiv:2104.04975, eq. 5.
    """
    log_det = float(np.log1p(spectrum.values / precision).sum())
    return log_likelihood - 0.5 * (log_det + precision * spectrum.norm)


def by_evidence(spectrum: Spectrum) -> tuple[float, int]:
    """(precision, steps) of MacKay's fixed point d = gamma / |theta|², gamma = sum h / (h + d).

    It is where the derivative of `log_evidence` is zero. Raises FitError when every parameter is
    zero: the evidence then has no maximum.
    """
    if spectrum.norm == 0.0:
        raise FitError(
            "the head's weights are all equal over classes: it predicts nothing, and the evidence "
            "says nothing of the prior; give prior_precision"
        )
    h, d = spectrum.values, 1.0
    for step in range(1, MAX_STEPS + 1):
        new = float(np.clip((h / (h + d)).sum() / spectrum.norm, *PRECISION_BOUNDS))
        if abs(new - d) <= 1e-10 * d:
            return new, step
        d = new
    return d, MAX_STEPS


def by_held_out(loss: Criterion, least: float = PRECISION_BOUNDS[0]) -> float:
    """The smallest precision from ``least`` on that is within ``FLAT`` of the best ``loss``, with
    nothing worse between the two: a grid of half decades, refined by golden section."""
    lo, hi = np.log(least), np.log(PRECISION_BOUNDS[1])
    grid = np.linspace(lo, hi, int(np.ceil((hi - lo) / np.log(10) * 2)) + 1)
    losses = [loss(float(np.exp(x))) for x in grid]
    i = int(np.argmin(losses))
    a, b = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    limit = min(losses[i], _golden(loss, a, b)) + FLAT
    worse = [k for k in range(i) if losses[k] > limit]
    if not worse:
        return float(np.exp(grid[0]))
    return _first(lambda d: loss(d) <= limit, float(grid[worse[-1]]), float(grid[worse[-1] + 1]))


def by_epsilon(distance: Criterion, epsilon: float) -> float:
    """The smallest precision within bounds at which ``distance``, which falls as the precision
    rises, is at most ``epsilon``."""
    if distance(PRECISION_BOUNDS[0]) <= epsilon:
        return PRECISION_BOUNDS[0]
    lo, hi = np.log(PRECISION_BOUNDS)
    return _first(lambda d: distance(d) <= epsilon, float(lo), float(hi))


def _first(holds: Callable[[float], bool], lo: float, hi: float) -> float:
    """Where a condition begins to hold between exp(lo), where it does not, and exp(hi)."""
    while hi - lo > 1e-9:
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if holds(float(np.exp(mid))) else (mid, hi)
    return float(np.exp(hi))


def _golden(loss: Criterion, a: float, b: float) -> float:
    """The least value met between exp(a) and exp(b)."""
    x, y = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    fx, fy = loss(float(np.exp(x))), loss(float(np.exp(y)))
    best = min(fx, fy)
    for _ in range(20):
        if fx <= fy:
            b, y, fy = y, x, fx
            x = b - _GOLDEN * (b - a)
            fx = loss(float(np.exp(x)))
        else:
            a, x, fx = x, y, fy
            y = a + _GOLDEN * (b - a)
            fy = loss(float(np.exp(y)))
        best = min(best, fx, fy)
    return best
