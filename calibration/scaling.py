"""Temperature and module strength, fitted together, last, on calibration rows.

Fitted one after the other they shrink twice or over-sharpen. Classification minimises the mean
negative log-likelihood of softmax(z / (T sqrt(1 + pi/8 s v))) over T > 0 and s >= 0; s = 0 is
temperature scaling (MacKay 1992 for the link, Guo et al. 2017 for T). Regression minimises the
Gaussian one with variance f² (noise + s v).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, FitError
from posthoc.folds import log_loss, log_softmax
from posthoc.links import PROBIT

LOG_T = (-5.0, 5.0)  # the naive unbracketed search fails on some tables
# The likelihood is often flat in s (on magika over four decades, within 0.0005 nats) and then says
# nothing about the module. Of the strengths it cannot tell from the best, the largest is kept, so
# that the epistemic share is the posterior's and not an accident of the split.
FLAT = 5e-4  # nats
# The probit link holds while s v is moderate: at the median calibration row the module may widen
# the logits' scale by at most sqrt(2). Beyond it T and s only trade against each other.
MAX_WIDENING = 1.0  # of pi/8 s median(v)
_GRID = np.concatenate([[0.0], np.logspace(-4, 0, 25)])


@dataclass(frozen=True, slots=True)
class Scaling:
    """``temperature`` T (regression: the factor f on the standard deviation) and ``strength`` s;
    ``temperature_alone`` is the best T at s = 0. Mean calibration NLL in nats of both: ``nll`` and
    ``nll_alone``."""

    temperature: float
    strength: float
    temperature_alone: float
    nll: float
    nll_alone: float


def mean_nll(z: Array, y: Array) -> float:
    """Mean negative log-likelihood in nats of integer labels under softmax(z)."""
    return float(log_loss(z, y).mean())


def fit_temperature(z: Array, y: Array) -> tuple[float, float]:
    """(T, mean NLL) by bisection on the derivative; the NLL is convex in 1/T. Guo et al. 2017."""
    z = np.asarray(z, np.float64)
    z = z - z.mean(1, keepdims=True)
    true = z[np.arange(len(z)), np.asarray(y)].mean()

    def slope(log_t: float) -> float:
        p = np.exp(log_softmax(z * np.exp(-log_t)))
        return float((p * z).sum(1).mean() - true)

    lo, hi = LOG_T
    for _ in range(60):
        mid = (lo + hi) / 2
        # slope > 0: too sharp, so the temperature must rise.
        lo, hi = (mid, hi) if slope(mid) > 0 else (lo, mid)
    t = float(np.exp((lo + hi) / 2))
    return t, mean_nll(z / t, y)


def fit_classification(z: Array, y: Array, variance: Array | None) -> Scaling:
    """T and s from calibration rows: outputs N×C, labels N, one logit variance a row (or None).

    Raises FitError for no rows, labels out of range or non-finite outputs.
    """
    z = np.asarray(z, np.float64)
    y = np.asarray(y, np.int64)
    if len(z) == 0:
        raise FitError("no calibration rows to fit a temperature on")
    if not np.isfinite(z).all():
        raise FitError("an output of the frozen model is not finite on a calibration row")
    if y.min() < 0 or y.max() >= z.shape[1]:
        raise FitError(f"a label lies outside 0..{z.shape[1] - 1}")
    t0, nll0 = fit_temperature(z, y)
    if variance is None:
        return Scaling(t0, 0.0, t0, nll0, nll0)
    v = np.asarray(variance, np.float64)
    unit = MAX_WIDENING / (PROBIT * max(float(np.median(v)), np.finfo(np.float64).tiny))
    found = [
        (s * unit, *fit_temperature(z / np.sqrt(1.0 + PROBIT * s * unit * v)[:, None], y))
        for s in _GRID
    ]
    best = min(nll for _, _, nll in found)
    strength, t, nll = [f for f in found if f[2] <= best + FLAT][-1]
    return Scaling(t, float(strength), t0, nll, nll0)


def fit_regression(error: Array, noise: Array, variance: Array | None) -> Scaling:
    """f and s from calibration rows: errors N×K, noise variances K, module variance N×K or None.

    For a given s the best f² is the mean of error² / (noise + s v). Raises FitError for no rows.
    """
    e2 = np.asarray(error, np.float64) ** 2
    if len(e2) == 0:
        raise FitError("no calibration rows to fit a scale on")
    noise = np.asarray(noise, np.float64)
    v = np.zeros_like(e2) if variance is None else np.asarray(variance, np.float64)

    def at(s: float) -> tuple[float, float]:
        total: F64 = noise + s * v
        f2 = max(float((e2 / total).mean()), np.finfo(np.float64).tiny)
        return float(np.sqrt(f2)), float(
            0.5 * (np.log(2 * np.pi * f2 * total) + e2 / (f2 * total)).mean()
        )

    f0, nll0 = at(0.0)
    if variance is None:
        return Scaling(f0, 0.0, f0, nll0, nll0)
    unit = float(np.median(noise)) / max(float(np.median(v)), np.finfo(np.float64).tiny)
    tried = [(float(s) * unit, *at(float(s) * unit)) for s in _GRID]
    best = min(nll for _, _, nll in tried)
    strength, f, nll = [x for x in tried if x[2] <= best + FLAT][-1]
    return Scaling(f, strength, f0, nll, nll0)
