"""Temperature and module strength, fitted together, last, on calibration rows.

Fitted one after the other they shrink twice or over-sharpen. Classification minimises the mean
negative log-likelihood of the served probabilities (`posthoc.links.log_probs`) over T > 0 and
s >= 0; s = 0 is temperature scaling (MacKay 1992 for the probit link, Guo et al. 2017 for T).
Regression minimises the Gaussian (or Student-t) one with variance f² (noise + s v). A module that
moves the outputs is taken the share k of its way, s = (k / T)² (regression: k²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln

from posthoc import links
from posthoc.contract import F64, Array, FitError
from posthoc.folds import log_loss, log_softmax
from posthoc.links import PROBIT, Predictive, Spread

LOG_T = (-5.0, 5.0)  # the naive unbracketed search fails on some tables
# The likelihood is often flat in s (on magika over four decades, within 0.0005 nats) and then says
# nothing about the module. Of the strengths it cannot tell from the best, the largest is kept, so
# that the epistemic share is the posterior's and not an accident of the split.
FLAT = 5e-4  # nats
# The probit link holds while s v is moderate: at the median calibration row the module may widen
# the logits' scale by at most sqrt(2). Beyond it T and s only trade against each other.
MAX_WIDENING = 1.0  # of pi/8 s median(v)
_GRID = np.concatenate([[0.0], np.logspace(-4, 0, 25)])
_WIDE = np.concatenate([_GRID, np.logspace(0.25, 3, 12)])  # where nothing is called epistemic
_SHARES = np.asarray([0.0, 0.05, 0.1, 0.25, 0.5, 1.0])  # of the way from the frozen head to its own
_STEPS = 13  # of a golden-section search over log T: 1/500 of the first bracket
_WORK = 4_000_000  # numbers N×S×C that one look at a mixture may take; more rows are not read


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
    """(T, mean NLL), T the root of the derivative by Brent's method; the NLL is convex in 1/T, and
    where it has no minimum within LOG_T the better end is taken. Guo et al. 2017."""
    z = np.asarray(z, np.float64)
    z = z - z.mean(1, keepdims=True)
    true = z[np.arange(len(z)), np.asarray(y)].mean()

    def slope(log_t: float) -> float:
        p = np.exp(log_softmax(z * np.exp(-log_t)))
        return float((p * z).sum(1).mean() - true)

    lo, hi = LOG_T
    # slope > 0: too sharp, so the temperature must rise.
    if slope(lo) <= 0:
        log_t = lo
    elif slope(hi) >= 0:
        log_t = hi
    else:
        log_t = float(brentq(slope, lo, hi, xtol=1e-12, rtol=1e-12))
    t = math.exp(log_t)
    return t, mean_nll(z / t, y)


def fit_classification(
    z: Array,
    y: Array,
    spread: Spread | None,
    predictive: Predictive = "probit",
    eps: Array | None = None,
) -> Scaling:
    """T and s from calibration rows: outputs N×C, labels N, what the module adds (or None) and
    how it becomes probabilities.

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
    if spread is None:
        return Scaling(t0, 0.0, t0, nll0, nll0)
    if predictive == "probit" and spread.variance is not None and spread.shift is None:
        v = np.asarray(spread.variance, np.float64)
        unit = _unit(v)
        found = [
            (s * unit, *fit_temperature(z / np.sqrt(1.0 + PROBIT * s * unit * v)[:, None], y))
            for s in (_GRID if spread.decomposes else _WIDE)
        ]
    else:
        found = _search(z, y, spread, predictive, eps, t0)
    best = min(nll for _, _, nll in found)
    strength, t, nll = [f for f in found if f[2] <= best + FLAT][-1]
    return Scaling(t, float(strength), t0, nll, nll0)


def _unit(v: F64) -> float:
    """The strength at which the module widens the median row's logits as far as it may."""
    return MAX_WIDENING / (PROBIT * max(float(np.median(v)), np.finfo(np.float64).tiny))


def _search(
    z: F64,
    y: Array,
    spread: Spread,
    predictive: Predictive,
    eps: Array | None,
    t0: float,
) -> list[tuple[float, float, float]]:
    """(s, T, NLL) for rising strengths, T by golden section on log T, from s = 0 up."""
    c = z.shape[1]
    draws = 1
    if spread.variance is None or predictive == "mc":
        draws = len(eps) if spread.draws is None and eps is not None else _members(spread)
    keep = slice(0, max(500, _WORK // (draws * c)))
    z, y, spread = z[keep], y[keep], _rows(spread, keep)
    moves = spread.variance is None or spread.shift is not None

    def nll(strength: float, t: float) -> float:
        log_p = links.log_probs(z, spread, t, strength, predictive, eps)
        return float(-log_p[np.arange(len(y)), y].mean())

    found = [(0.0, t0, mean_nll(z / t0, y))]
    grid = _SHARES[1:] if moves else _GRID[1::3] * _unit(np.asarray(spread.variance))
    centre = math.log(t0)
    for step in grid:

        def strength(t: float, step: float = float(step)) -> float:
            return (step / t) ** 2 if moves else step

        def at(log_t: float, strength: Callable[[float], float] = strength) -> float:
            return nll(strength(math.exp(log_t)), math.exp(log_t))

        centre = _golden(at, centre)
        t = math.exp(centre)
        found.append((strength(t), t, at(centre)))
    return found


def _golden(f: Callable[[float], float], centre: float) -> float:
    """The minimum of a unimodal function within a factor e of ``centre`` in T, kept in LOG_T."""
    lo, hi = max(centre - 1.0, LOG_T[0]), min(centre + 1.0, LOG_T[1])
    ratio = (math.sqrt(5) - 1) / 2
    a, b = hi - ratio * (hi - lo), lo + ratio * (hi - lo)
    fa, fb = f(a), f(b)
    for _ in range(_STEPS):
        if fa <= fb:
            hi, b, fb = b, a, fa
            a = hi - ratio * (hi - lo)
            fa = f(a)
        else:
            lo, a, fa = a, b, fb
            b = lo + ratio * (hi - lo)
            fb = f(b)
    return (lo + hi) / 2


def _members(spread: Spread) -> int:
    assert spread.draws is not None
    return int(spread.draws.shape[1])


def _rows(spread: Spread, keep: slice) -> Spread:
    """The spread of some of the rows."""
    cut = {
        name: None if (value := getattr(spread, name)) is None else value[keep]
        for name in ("variance", "amplitude", "draws", "class_variance", "shift")
    }
    return Spread(directions=spread.directions, **cut)


def student_nll(error: Array, variance: Array, df: float) -> F64:
    """Negative log density in nats of errors under a Student-t of the given *variance*, df > 2;
    an infinite df is the Gaussian."""
    e2, v = np.asarray(error, np.float64) ** 2, np.asarray(variance, np.float64)
    if math.isinf(df):
        return np.asarray(0.5 * (np.log(2 * np.pi * v) + e2 / v))
    scale2 = v * (df - 2) / df
    constant = gammaln(df / 2) - gammaln((df + 1) / 2) + 0.5 * math.log(df * math.pi)
    return np.asarray(
        constant + 0.5 * np.log(scale2) + 0.5 * (df + 1) * np.log1p(e2 / (df * scale2))
    )


def fit_regression(
    error: Array, noise: Array, spread: Spread | None, df: float = math.inf
) -> Scaling:
    """f and s from calibration rows: errors N×K of the frozen means, noise variances K, and what
    the module adds or None; ``df`` of a Student-t predictive.

    For a given s the best f² of a Gaussian is the mean of error² / (noise + s v). Raises FitError
    for no rows.
    """
    error = np.asarray(error, np.float64)
    if len(error) == 0:
        raise FitError("no calibration rows to fit a scale on")
    noise = np.asarray(noise, np.float64)
    v = np.zeros_like(error)
    shift = None
    if spread is not None:
        assert spread.variance is not None
        v, shift = np.asarray(spread.variance, np.float64), spread.shift

    def at(s: float) -> tuple[float, float]:
        e = error if shift is None else error - math.sqrt(s) * shift
        total: F64 = noise + s * v
        f2 = max(float((e**2 / total).mean()), np.finfo(np.float64).tiny)
        if math.isfinite(df):
            log_f = _golden(
                lambda u: float(student_nll(e, math.exp(2 * u) * total, df).mean()),
                0.5 * math.log(f2),
            )
            f2 = math.exp(2 * log_f)
        return math.sqrt(f2), float(student_nll(e, f2 * total, df).mean())

    f0, nll0 = at(0.0)
    if spread is None:
        return Scaling(f0, 0.0, f0, nll0, nll0)
    if shift is not None:
        strengths = _SHARES**2
    else:
        unit = float(np.median(noise)) / max(float(np.median(v)), np.finfo(np.float64).tiny)
        strengths = (_GRID if spread.decomposes else _WIDE) * unit
    tried = [(float(s), *at(float(s))) for s in strengths]
    best = min(nll for _, _, nll in tried)
    strength, f, nll = [x for x in tried if x[2] <= best + FLAT][-1]
    return Scaling(f, strength, f0, nll, nll0)
