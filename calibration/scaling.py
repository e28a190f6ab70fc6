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
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

from posthoc import links
from posthoc.contract import F64, Array, FitError
from posthoc.folds import log_loss
from posthoc.links import PROBIT, Predictive, Spread
from posthoc.methods import temperature

# The likelihood is often flat in s (on magika over four decades, within 0.0005 nats) and then says
# nothing about the module. Of the strengths it cannot tell from the best, the largest up to the
# module's own is kept, so that the epistemic share is the posterior's and no accident of the split.
FLAT = 5e-4  # nats
_RATIO = 1.92  # nats over all rows: the 95 % point of the likelihood ratio of one parameter
# The probit link holds while s v is moderate: at the median calibration row the module may widen
# the logits' scale by at most sqrt(2). Beyond it T and s only trade against each other.
MAX_WIDENING = 1.0  # of pi/8 s median(v)
_GRID = np.concatenate([[0.0], np.logspace(-4, 0, 25)])
_WIDE = np.concatenate([_GRID, np.logspace(0.25, 3, 12)])  # where nothing is called epistemic
_SHARES = np.asarray([0.0, 0.05, 0.1, 0.25, 0.5, 1.0])  # of the way from the frozen head to its own
_CLOSE = 2e-3  # of log T, where it is searched: within 1e-6 nats of the best
# Numbers N×S×C that one look at a mixture takes, on rows drawn from all; more only to have
# LEAST_ROWS, and then at most so many.
_WORK, LEAST_ROWS, _MOST = 4_000_000, 500, 16_000_000


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


def fit_temperature(z: Array, y: Array, start: float = 1.0) -> tuple[float, float]:
    """(T, mean NLL) by `posthoc.methods.temperature.fit_temperature`, which smooths the labels by a
    tenth of a row: without it rows that are all predicted right would make every probability 1."""
    z = np.asarray(z, np.float64)
    t = temperature.fit_temperature(z, y, start)
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
        found = _walk(z, y, spread, t0)
    else:
        found = _search(z, y, spread, predictive, eps, t0)
    # Temperature scaling gives s = 1 / T² to the head that the module describes.
    strength, t, nll = _keep(found, spread, lambda s, t: s * t**2, len(z))
    return Scaling(t, strength, t0, nll, found[0][2])


def _keep(
    found: list[tuple[float, float, float]],
    spread: Spread,
    own: Callable[[float, float], float],
    n: int,
) -> tuple[float, float, float]:
    """Which of the (s, T, NLL), for rising s, is taken; ``own`` of s and T is the share of the
    module's own strength, ``n`` the rows of the NLL.

    Of those within FLAT of the best up to the module's own strength, the largest. More than its own
    only where the likelihood ratio says so, and then the least. Where nothing is called epistemic,
    the least within FLAT.
    """
    best = min(nll for _, _, nll in found)
    if not spread.decomposes:
        return next(f for f in found if f[2] <= best + FLAT)
    within = [f for f in found if own(f[0], f[1]) <= 1.0 + 1e-9]
    reached = min(nll for _, _, nll in within)
    if reached - best > max(FLAT, _RATIO / n):
        return next(f for f in found if f[2] <= best + FLAT)
    return [f for f in within if f[2] <= reached + FLAT][-1]


def _unit(v: F64) -> float:
    """The strength at which the module widens the median row's logits as far as it may."""
    return MAX_WIDENING / (PROBIT * max(float(np.median(v)), np.finfo(np.float64).tiny))


def _walk(z: F64, y: Array, spread: Spread, t0: float) -> list[tuple[float, float, float]]:
    """(s, T, NLL) for rising strengths under the probit link with one variance a row."""
    v = np.asarray(spread.variance, np.float64)
    found, t = [], t0
    for s in (_GRID if spread.decomposes else _WIDE) * _unit(v):
        t, nll = fit_temperature(z / np.sqrt(1.0 + PROBIT * s * v)[:, None], y, t)
        found.append((float(s), t, nll))
    return found


def _search(
    z: F64,
    y: Array,
    spread: Spread,
    predictive: Predictive,
    eps: Array | None,
    t0: float,
) -> list[tuple[float, float, float]]:
    """(s, T, NLL) for rising strengths from s = 0 up, under any link. Where not all rows are read,
    T is corrected by what the rows read do to the temperature alone."""
    drawn = spread.variance is None or predictive == "mc"
    moves = spread.variance is None or spread.shift is not None
    unit = 1.0 if moves else _unit(np.asarray(spread.variance))
    n, c = z.shape
    members = _draws(spread, eps) if drawn else 1
    most = max(_WORK // (members * c), min(LEAST_ROWS, _MOST // (members * c)), 1)
    correction = 1.0
    if most < n:
        keep = np.sort(np.random.default_rng(0).permutation(n)[:most])
        z, y, spread = z[keep], y[keep], _rows(spread, keep)
        here, _ = fit_temperature(z, y, t0)
        correction, t0 = t0 / here, here
    if drawn:
        spread = Spread(None, draws=links.deviations(spread, eps))
    elif predictive != "probit":
        spread = replace(spread, class_variance=links.class_variance(spread))
    smoothing = temperature.SMOOTHING / (len(z) + temperature.SMOOTHING)

    def nll(strength: float, t: float) -> float:
        log_p = links.log_probs(z, spread, t, strength, predictive, eps)
        true = float(log_p[np.arange(len(y)), y].mean())
        return -(1 - smoothing) * true - smoothing * float(log_p.mean())

    found = [(0.0, t0 * correction, nll(0.0, t0))]
    centre = math.log(t0)
    for step in _SHARES[1:] if moves else _GRID[1::3] * unit:

        def strength(t: float, step: float = float(step)) -> float:
            return (step / t) ** 2 if moves else step

        def at(log_t: float, strength: Callable[[float], float] = strength) -> float:
            return nll(strength(math.exp(log_t)), math.exp(log_t))

        centre = _minimum(at, centre, temperature.LOG_T)
        t = math.exp(centre) * correction
        found.append((strength(t), t, at(centre)))
    return found


def _minimum(
    f: Callable[[float], float], centre: float, within: tuple[float, float] = (-math.inf, math.inf)
) -> float:
    """Where a unimodal function has its minimum, at most one from ``centre``: Brent's method."""
    bounds = max(centre - 1.0, within[0]), min(centre + 1.0, within[1])
    return float(minimize_scalar(f, bounds=bounds, method="bounded", options={"xatol": _CLOSE}).x)


def _draws(spread: Spread, eps: Array | None) -> int:
    if spread.draws is not None:
        return int(spread.draws.shape[1])
    assert eps is not None
    return len(eps)


def _rows(spread: Spread, keep: Array) -> Spread:
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
    for no rows, errors that are not finite or all zero, and for a noise that is not above zero.
    """
    error = np.asarray(error, np.float64)
    if len(error) == 0:
        raise FitError("no calibration rows to fit a scale on")
    if not np.isfinite(error).all():
        raise FitError("a mean of the frozen model or a target is not finite on a calibration row")
    noise = np.asarray(noise, np.float64)
    if not ((noise > 0).all() and error.any()):
        raise FitError("the model predicts the targets without error; check for leakage")
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
            log_f = _minimum(
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
        unit = 1.0 / max(float(np.median(v / noise)), np.finfo(np.float64).tiny)
        strengths = (_GRID if spread.decomposes else _WIDE) * unit
        if unit > 1.0:
            strengths = np.sort(np.append(strengths, 1.0))
    tried = [(float(s), *at(float(s))) for s in strengths]
    strength, f, nll = _keep(tried, spread, lambda s, _: s, len(error))
    return Scaling(f, strength, f0, nll, nll0)
