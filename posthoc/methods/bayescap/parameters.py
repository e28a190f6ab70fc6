"""From what a cap's network says of a row to alpha and beta, and back to a likelihood.

A network gives two numbers an output, K of each: log alpha and b, with log beta = M + H tanh(b / 2)
inside a range. Both are counted from constants, those of the homoscedastic generalised Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import cheb2poly
from scipy.special import digamma

from posthoc.contract import F64, Array
from posthoc.methods.bayescap import generalised_gaussian as gg

if TYPE_CHECKING:
    from posthoc.graph import Fragment

# A network may find tails a little lighter than the normal's, no more: with beta = 6 one strange
# error of 16 standard deviations costs thousands of nats. Nor heavier than these: at beta = 0.3 the
# variance is 100,000 alpha², nearly all of it from errors that no fit has seen.
BETA = (0.5, 3.0)
MIDDLE = float(np.log(BETA).mean())
HALF = float(np.log(BETA[1] / BETA[0])) / 2
# Of the constants, whose b is finite.
INNER = (float(np.exp(MIDDLE - 0.99 * HALF)), float(np.exp(MIDDLE + 0.99 * HALF)))
# The exponent from which training goes on with the tangent: an error counts as ten at most. The
# density that is fitted has power tails instead, which take 1e-4 of it, and a single wrong label no
# longer leads the network.
MOST = float(np.log(10.0))
# Of the root mean squared error: smaller ones count like this. Where a model is exact on some rows,
# as on the black background of an image, no alpha would be small enough.
FINEST = 1e-4
GATES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of what the network says
INSIDE = 0.999  # of held-out rows count as rows like those of the fit
CAPS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)  # of held-out variances
_DEGREE = 8


def log_beta(b: Array) -> F64:
    """log beta, within the range."""
    return np.asarray(MIDDLE + HALF * np.tanh(np.asarray(b, np.float64) / 2))


def to_b(beta: Array) -> F64:
    """The b of a beta inside the range."""
    return np.asarray(2 * np.arctanh((np.log(beta) - MIDDLE) / HALF))


def constants(error: Array) -> F64:
    """log alpha K and b K of the homoscedastic distribution of errors N×K."""
    alpha, beta = gg.fit(error, INNER)
    return np.concatenate([np.log(alpha), to_b(beta)])


def middle(error: Array) -> F64:
    """The same with b = 0, whatever the tails: where a network starts, for at the edge of its range
    b would not move."""
    beta = np.exp(MIDDLE)
    power = np.mean(np.abs(np.asarray(error, np.float64)) ** beta, axis=0)
    return np.append(np.log(beta * power) / beta, np.zeros(len(power)))


def finest(error: Array) -> F64:
    """The least error that counts, K, of errors N×K."""
    return np.asarray(FINEST * np.sqrt(np.mean(np.square(error), axis=0)))


def objective(start: Array) -> Callable[[Array, Array], tuple[float, F64]]:
    """The likelihood that trains a network, its outputs counted from ``start`` 2K: of outputs
    N×2K and log errors N×K, (mean negative log-likelihood in nats, its gradient)."""
    start = np.asarray(start, np.float64)
    k = len(start) // 2

    def value(raw: Array, log_r: Array) -> tuple[float, F64]:
        x = np.asarray(raw, np.float64) + start
        log_alpha, t = x[:, :k], np.tanh(x[:, k:] / 2)
        u = MIDDLE + HALF * t
        beta = np.exp(u)
        e = beta * (log_r - log_alpha)
        slope = gg.slope(e, MOST)
        by_alpha = 1.0 - beta * slope
        by_u = -digamma(1.0 / beta) / beta - 1.0 + e * slope
        by_b = by_u * HALF * (1.0 - t**2) / 2
        loss = gg.log_nll(log_r, log_alpha, u, MOST)
        return float(loss.mean()), np.concatenate([by_alpha, by_b], 1) / loss.size

    return value


def bounds(raw: Array) -> tuple[F64, F64]:
    """What the outputs n×2K of a network are kept between: all but one in a thousand at each end
    of what it says of held-out rows."""
    low, high = np.quantile(np.asarray(raw, np.float64), (1 - INSIDE, INSIDE), axis=0)
    return low, high


@dataclass(frozen=True, slots=True)
class Recalibration:
    """What held-out rows make of a network, an output each: the share ``gate`` of it that is
    kept, 0 for the constants alone, and ``log_scale`` of alpha, 0 for the constants, which all rows
    gave. Mean negative log-likelihoods in nats, an error counting as in training: ``nll`` of that
    share and ``nll_constant`` of the constants, each at its best scale."""

    gate: F64
    log_scale: F64
    nll: F64
    nll_constant: F64


def recalibrate(raw: Array, log_r: Array, fixed: Array) -> Recalibration:
    """Share and scale of the largest likelihood of held-out rows: outputs N×2K, log errors N×K
    (no finer than `finest`), constants ``fixed`` 2K.

    No share is among the candidates, so that on these rows the result is never worse than the
    homoscedastic distribution; an error counts as in training.
    """
    raw, k = np.asarray(raw, np.float64), log_r.shape[1]
    found = []
    for i in range(k):
        size, a, b = log_r[:, i], raw[:, i], raw[:, k + i]
        tried = []
        for gate in GATES:
            log_alpha, u = fixed[i] + gate * a, log_beta(fixed[k + i] + gate * b)
            c = gg.log_scale(size, log_alpha, u, MOST)
            value = float(gg.log_nll(size, log_alpha + c, u, MOST).mean())
            tried.append((value, gate, c if gate else 0.0))
        value, gate, c = min(tried)
        found.append((gate, c, value, tried[0][0]))
    return Recalibration(*(np.asarray(v) for v in zip(*found, strict=True)))


def bound_variance(log_v: Array, squared: Array) -> tuple[F64, F64]:
    """(log of the largest variance K, log of a factor K) that make variances of held-out rows: log
    variances and squared errors n×K.

    The variance of a heavy tail is mostly made of errors that nobody has seen, so that where beta
    is small it is too large by a factor of ten and more. The pair with the least
    log v + r² / v is taken, a loss that is least at the true variance (Patton 2011, "Volatility
    forecast comparison using imperfect volatility proxies", J. Econometrics 160), among quantiles
    of the variances, each with the factor that makes the mean right.
    """
    found = []
    for v, r2 in zip(np.asarray(log_v, np.float64).T, np.asarray(squared).T, strict=True):
        tried = []
        for most in np.quantile(v, CAPS):
            kept = np.minimum(v, most)
            factor = float(np.log(r2.mean()) - np.log(np.exp(kept).mean()))
            loss = float((kept + factor + r2 * np.exp(-kept - factor)).mean())
            tried.append((loss, -float(most), factor))
        _, negative, factor = min(tried)
        found.append((-negative, factor))
    most, factor = np.asarray(found).T
    return most, factor


def emit_log_beta(g: Fragment, b: str) -> str:
    """`log_beta` as a graph fragment."""
    t = g.op("Tanh", g.op("Mul", b, g.const(0.5)))
    return g.op("Add", g.op("Mul", t, g.const(HALF)), g.const(MIDDLE))


def emit_log_variance_factor(g: Fragment, u: str) -> str:
    """`generalised_gaussian.log_variance_factor` of log beta within the range as a graph fragment.

    ONNX has no log-gamma; a polynomial in log beta is within 1e-7 of it, and 1e-6 in float32.
    """
    t = g.op("Mul", g.op("Sub", u, g.const(MIDDLE)), g.const(1.0 / HALF))
    *lower, total = (g.const(float(c)) for c in _polynomial())
    for c in reversed(lower):
        total = g.op("Add", g.op("Mul", total, t), c)
    return total


@cache
def _polynomial() -> tuple[float, ...]:
    """Coefficients, constant first, of the factor in t = (log beta - M) / H."""

    def factor(t: F64) -> F64:
        return gg.log_variance_factor(np.exp(MIDDLE + HALF * t))

    found = Chebyshev.interpolate(factor, _DEGREE)
    return tuple(float(c) for c in cheb2poly(found.coef))
