"""The generalised Gaussian p(r) = beta / (2 alpha Gamma(1 / beta)) exp(-(|r| / alpha)^beta).

Normal for beta = 2 (alpha² is twice the variance), Laplace for beta = 1, uniform as beta grows
(Nadarajah 2005, "A generalized normal distribution", J. Appl. Stat. 32). Every function takes
arrays that broadcast, in the units of the error, and works in float64.

The power is taken in log space, exponents between -20 and 7, and beyond 7 the tangent goes on: no
error overflows, and every one still says that alpha is too small. What this takes from the density
is less than exp(-1096).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gammainc, gammainccinv, gammaln

from posthoc.contract import F64, Array, FitError

BETA = (0.3, 8.0)  # that a fit of constants may find
LOWEST, HIGHEST = -20.0, 7.0  # exponents
_TINY = float(np.finfo(np.float64).tiny)
_LOOKS = 13  # at beta, before the best is refined
_LOG_SCALE = 60.0  # no alpha is off by more


def log_size(error: Array, least: Array | float = _TINY) -> F64:
    """log |r|, where smaller errors count as ``least``."""
    return np.asarray(np.log(np.maximum(np.abs(np.asarray(error, np.float64)), least)))


def energy(exponent: Array, highest: float = HIGHEST) -> F64:
    """(|r| / alpha)^beta from its logarithm, the tangent beyond ``highest``."""
    e = np.asarray(exponent, np.float64)
    return np.exp(np.clip(e, LOWEST, highest)) * (1.0 + np.maximum(e - highest, 0.0))


def slope(exponent: Array, highest: float = HIGHEST) -> F64:
    """The derivative of `energy`."""
    e = np.asarray(exponent, np.float64)
    return np.where(e > LOWEST, np.exp(np.clip(e, LOWEST, highest)), 0.0)


def nll(error: Array, alpha: Array, beta: Array) -> F64:
    """Negative log density in nats."""
    return log_nll(log_size(error), np.log(alpha), np.log(beta))


def log_nll(log_r: Array, log_alpha: Array, log_beta: Array, highest: float = HIGHEST) -> F64:
    """The same from logarithms of all three; ``highest`` as in `energy`."""
    beta = np.exp(np.asarray(log_beta, np.float64))
    power = energy(beta * (log_r - log_alpha), highest)
    return np.asarray(np.log(2.0) + log_alpha + gammaln(1.0 / beta) - log_beta + power)


def density(error: Array, alpha: Array, beta: Array) -> F64:
    """exp(-nll)."""
    return np.exp(-nll(error, alpha, beta))


def log_variance_factor(beta: Array) -> F64:
    """log of Gamma(3 / beta) / Gamma(1 / beta), the variance at alpha = 1."""
    beta = np.asarray(beta, np.float64)
    return np.asarray(gammaln(3.0 / beta) - gammaln(1.0 / beta))


def variance(alpha: Array, beta: Array) -> F64:
    """alpha² Gamma(3 / beta) / Gamma(1 / beta)."""
    return np.asarray(np.square(alpha) * np.exp(log_variance_factor(beta)))


def cdf(error: Array, alpha: Array, beta: Array) -> F64:
    """P(R <= r)."""
    error, beta = np.asarray(error, np.float64), np.asarray(beta, np.float64)
    inside = gammainc(1.0 / beta, (np.abs(error) / alpha) ** beta)
    return np.asarray(0.5 * (1.0 + np.sign(error) * inside))


def quantile(p: Array, alpha: Array, beta: Array) -> F64:
    """The r with P(R <= r) = p, for 0 < p < 1."""
    p, beta = np.asarray(p, np.float64), np.asarray(beta, np.float64)
    outside = 2.0 * np.minimum(p, 1.0 - p)
    size = alpha * gammainccinv(1.0 / beta, outside) ** (1.0 / beta)
    return np.asarray(np.sign(p - 0.5) * size)


def fit(error: Array, within: tuple[float, float] = BETA) -> tuple[F64, F64]:
    """(alpha K, beta K) of the largest likelihood of errors N×K, beta ``within`` a range.

    For a given beta the best alpha is closed, alpha^beta = beta mean |r|^beta; over log beta the
    rest is a look at the whole range and Brent's method around the best. Raises FitError for no
    rows and for an output without any error.
    """
    size = np.abs(np.asarray(error, np.float64))
    if len(size) == 0:
        raise FitError("a generalised Gaussian needs errors and has none")
    if not size.any(0).all():
        raise FitError("the model predicts the labels without error; check for leakage")
    found = [_fit_one(column / column.mean(), float(column.mean()), within) for column in size.T]
    return np.asarray([a for a, _ in found]), np.asarray([b for _, b in found])


def _fit_one(size: F64, unit: float, within: tuple[float, float]) -> tuple[float, float]:
    def log_alpha(log_beta: float) -> float:
        beta = np.exp(log_beta)
        return float((log_beta + np.log(np.mean(size**beta))) / beta)

    def cost(log_beta: float) -> float:
        inverse = np.exp(-log_beta)
        return float(log_alpha(log_beta) + gammaln(inverse) - log_beta + inverse)

    grid = np.linspace(np.log(within[0]), np.log(within[1]), _LOOKS)
    best = int(np.argmin([cost(u) for u in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, _LOOKS - 1)]
    u = float(minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-6}).x)
    return unit * float(np.exp(log_alpha(u))), float(np.exp(u))


def log_scale(log_r: Array, log_alpha: Array, log_beta: Array, highest: float = HIGHEST) -> float:
    """log c such that the alphas c alpha have the largest likelihood: log |r|, log alpha and
    log beta N each, the errors not all zero; ``highest`` as in `energy`.

    c is where the mean of beta (|r| / (c alpha))^beta is 1; with one beta for all rows that is
    c^beta = beta mean((|r| / alpha)^beta).
    """
    beta = np.exp(np.asarray(log_beta, np.float64))
    exponent = beta * (np.asarray(log_r, np.float64) - log_alpha)

    def excess(log_c: float) -> float:
        return float((beta * slope(exponent - beta * log_c, highest)).mean()) - 1.0

    return float(brentq(excess, -_LOG_SCALE, _LOG_SCALE, xtol=1e-10))
