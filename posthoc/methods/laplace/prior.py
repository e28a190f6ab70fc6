"""The precision of the prior: by evidence, by held-out likelihood, or without labels.

``Spectrum`` is all that the evidence needs of a posterior, whatever its structure. The other rules
take a function of the precision (`posthoc.methods.laplace.criteria`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, FitError

# The range of the precision that the rules search, in units of the one at which the prior alone
# gives the median row a variance of one (in a regression: the noise's), so that the answer does not
# depend on the unit of the features. Above it lies the frozen model. Below it the prior means
# nothing any more, and directions in which no row lies would drown float32.
RANGE = (1e-6, 1e10)
CLOSE = 1e-10  # a relative step of the precision that counts as none
MAX_STEPS = 100
# Effective parameters below which a fit has none, and the evidence rises to the end of any range.
LEAST_KNOWN = 1e-6
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

    It is where the derivative of `log_evidence` is zero, and the only one. In log d the right side
    falls with a slope between 0 and -1, near -1 where the rows say little: repeating it then swings
    for thousands of steps, while Newton's method converges from anywhere. Raises FitError where the
    evidence has no maximum: every parameter is zero, or the model is certain of every row.
    """
    h, norm = spectrum.values, spectrum.norm
    if norm == 0.0:
        raise FitError(
            "the head's weights are all equal over classes: it predicts nothing, and the evidence "
            "says nothing of the prior; give prior_precision"
        )
    if h.sum() * norm < LEAST_KNOWN**2:
        raise FitError(
            "the model is certain of every row, so that the evidence says nothing of the prior; "
            "give prior_precision, or another rule where the module has one"
        )
    d = float(np.sqrt(h.sum() / norm))  # the fixed point where the rows say little
    steps = 0
    while steps < MAX_STEPS:
        steps += 1
        known = h / (h + d)
        gamma = float(known.sum())
        slope = -float((known * (1.0 - known)).sum()) / gamma
        move = (np.log(gamma / norm) - np.log(d)) / (1.0 - slope)
        d *= float(np.exp(move))
        if abs(move) <= CLOSE:
            break
    return d, steps


def by_held_out(loss: Criterion, least: float, most: float) -> float:
    """The smallest precision from ``least`` to ``most`` that is within ``FLAT`` of the best
    ``loss``, with nothing worse between the two: a grid of half decades, refined by golden
    section."""
    lo, hi = np.log(least), np.log(most)
    grid = np.linspace(lo, hi, int(np.ceil((hi - lo) / np.log(10) * 2)) + 1)
    losses = [loss(float(np.exp(x))) for x in grid]
    i = int(np.argmin(losses))
    a, b = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    limit = min(losses[i], _golden(loss, a, b)) + FLAT
    worse = [k for k in range(i) if losses[k] > limit]
    if not worse:
        return float(np.exp(grid[0]))
    return _first(lambda d: loss(d) <= limit, float(grid[worse[-1]]), float(grid[worse[-1] + 1]))


def by_epsilon(distance: Criterion, epsilon: float, least: float) -> float:
    """The smallest precision from ``least`` on at which ``distance``, which falls to nothing as the
    precision rises, is at most ``epsilon``."""
    if distance(least) <= epsilon:
        return least
    most = least
    while distance(most) > epsilon:
        most *= 1e4
    return _first(lambda d: distance(d) <= epsilon, float(np.log(most / 1e4)), float(np.log(most)))


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
