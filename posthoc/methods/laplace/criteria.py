"""What a precision is judged by, and the choice itself, for both tasks.

The predictive is the probit link of `posthoc.links` at strength one, with one variance a row; in a
regression the Gaussian of noise plus posterior variance. Both are judged with the scale that suits
them best (temperature, or one factor on the standard deviation), so that the precision is not
chosen to mend it: that is fitted later, on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from scipy.special import ndtr

from posthoc.contract import F64, Array, Features, FitError, LinearHead, State
from posthoc.folds import class_index, log_softmax
from posthoc.links import PROBIT, probit_scale
from posthoc.methods.laplace.prior import (
    RANGE,
    Criterion,
    Spectrum,
    by_epsilon,
    by_evidence,
    by_held_out,
)
from posthoc.methods.laplace.settings import Prior
from posthoc.methods.laplace.sums import real
from posthoc.rows import join, take

# The probit link holds while the variance is moderate: at the median row it may widen the logits'
# scale by at most sqrt(2), as in `calibration.scaling`.
MAX_WIDENING = 1.0
_LOG_T = (-5.0, 5.0)
_ALONE = 1e150  # a precision beside which no curvature counts
_WORK = 1_000_000  # outputs N×C that one look at a precision may take (features: 8 times that)

# What a state keeps of how its prior was found.
OF_RULES = ("prior", "epsilon", "uncalibrated", "prior_unlimited")
Said = dict[str, Any]
S = TypeVar("S")
P = TypeVar("P", bound=Prior)
# N×J features of rows and a precision give the variance: N (mean over pairs of classes of the
# variance of a difference of logits), or in a regression N×K.
Variance = Callable[[F64, float], F64]


def finished(
    posterior: Callable[[S, LinearHead, P, Features | None], State],
    update: Callable[[S, Features], S],
    stats: S,
    head: LinearHead,
    settings: P,
    heldout: Features | None,
) -> State:
    """The posterior of a fold. Rows held out for the choice of the precision join it afterwards."""
    state = posterior(stats, head, settings, heldout)
    if not settings.needs_held_out or heldout is None:
        return state
    chosen = settings.given(state.settings["prior_precision"])
    whole = posterior(update(stats, heldout), head, chosen, None)
    kept = {k: state.settings[k] for k in OF_RULES if k in state.settings}
    return State(whole.tensors, {**whole.settings, **kept})


def thinned(blocks: Iterable[Features], n: int) -> Features:
    """Evenly spaced ones of n rows, as many as `_WORK` allows; FitError when there are none."""
    kept, seen = [], 0
    for block in blocks:
        width = max(block.z.shape[1], _width(block) / 8)
        step = max(1, int(np.ceil(n * width / _WORK)))
        kept.append(take(block, slice(-seen % step, None, step)))
        seen += len(block)
    if seen == 0:
        raise FitError(
            "the prior's rule needs rows that the posterior has not seen and there are none; give "
            "more rows, prior=evidence or prior_precision"
        )
    return join(kept)


def choose_classification(
    settings: Prior,
    spectrum: Spectrum | None,
    rows: Features | None,
    squares: Callable[[Array], F64],
    variance: Variance,
) -> tuple[float, Said]:
    """(precision, what the state says of the choice) for a classifier.

    ``rows`` are those that the posterior has not seen; ``squares`` maps their features to N×J.
    Raises FitError for a rule whose rows or labels are absent.
    """
    if settings.prior_precision is not None:
        return said(settings, settings.prior_precision)
    if settings.prior == "evidence":
        assert spectrum is not None
        precision, steps = by_evidence(spectrum)
        return said(settings, precision, fixed_point_steps=steps)
    rows = _some(rows)
    fixed = squares(real(rows.phi))

    def at(precision: float) -> F64:
        return variance(fixed, precision)

    z = np.asarray(rows.z, np.float64)
    low, high = _range(at(_ALONE))
    if settings.prior == "epsilon":
        return _label_free(settings, _total_variation(z, at), low)
    y = class_index(_labels(rows), z.shape[1])
    least = by_epsilon(lambda d: PROBIT * float(np.median(at(d))), MAX_WIDENING, low)
    return _searched(settings, by_held_out(_log_loss(z, y, at), least, max(high, least)), low)


def choose_regression(
    settings: Prior,
    rows: Features | None,
    squares: Callable[[Array], F64],
    noise: Callable[[float], F64],
    variance: Variance,
) -> tuple[float, Said]:
    """The same for a regression, where the evidence comes with the noise
    (`posthoc.methods.laplace.noise`). ``noise`` (K) is a function of the precision too."""
    if settings.prior_precision is not None:
        return said(settings, settings.prior_precision)
    rows = _some(rows)
    fixed = squares(real(rows.phi))
    low, high = _range(variance(fixed, _ALONE) / noise(_ALONE))
    if settings.prior == "epsilon":
        return _label_free(
            settings, lambda d: gaussian_variation(1.0 + variance(fixed, d) / noise(d)), low
        )
    squared = (np.asarray(_labels(rows), np.float64) - np.asarray(rows.z, np.float64)) ** 2

    def loss(precision: float) -> float:
        total = noise(precision) + variance(fixed, precision)
        factor = max(float((squared / total).mean()), np.finfo(np.float64).tiny)
        return float(0.5 * (np.log(total).mean() + np.log(factor)))

    return _searched(settings, by_held_out(loss, low, high), low)


def said(settings: Prior, precision: float, **more: Any) -> tuple[float, Said]:
    """A precision and what the state says of it."""
    return precision, {"prior": settings.rule, "prior_precision": float(precision), **more}


def _some(rows: Features | None) -> Features:
    return thinned([] if rows is None else [rows], 0 if rows is None else len(rows))


def _width(block: Features) -> int:
    return 0 if block.phi is None else int(block.phi.shape[1])


def _range(alone: F64) -> tuple[float, float]:
    """The precisions between which a rule searches, for the variances at `_ALONE`."""
    unit = float(np.median(alone)) * _ALONE
    return RANGE[0] * unit, RANGE[1] * unit


def _searched(settings: Prior, found: float, low: float, **more: Any) -> tuple[float, Said]:
    """As `said`; ``prior_unlimited`` where the rule is content with the smallest precision that it
    may choose, so that the rows set no prior."""
    if found <= low:
        more["prior_unlimited"] = True
    return said(settings, found, **more)


def _label_free(settings: Prior, distance: Criterion, low: float) -> tuple[float, Said]:
    found = by_epsilon(distance, settings.epsilon, low)
    return _searched(settings, found, low, epsilon=settings.epsilon, uncalibrated=True)


def _labels(rows: Features) -> Array:
    if rows.y is None:
        raise FitError(
            "prior=heldout needs labels: name their column with --target, or use epsilon"
        )
    return rows.y


def _log_loss(z: F64, y: Array, variance: Callable[[float], F64]) -> Criterion:
    """Mean NLL of the probit predictive at its best temperature, which is convex in 1/T."""
    z = z - z.mean(1, keepdims=True)
    index = np.arange(len(z)), y

    start = 1.0  # the last precision's 1/T

    def loss(precision: float) -> float:
        nonlocal start
        u = z * probit_scale(variance(precision), 1.0, 1.0)[:, None]
        true = float(u[index].mean())
        lo, hi = np.exp(_LOG_T)
        beta = start
        for _ in range(100):
            log_p = log_softmax(beta * u)
            p = np.exp(log_p)
            mean = (p * u).sum(1)
            slope = float(mean.mean()) - true
            bend = float((p * u**2).sum(1).mean() - (mean**2).mean())
            lo, hi = (lo, beta) if slope > 0 else (beta, hi)
            step = beta - slope / bend if bend > 0 else lo
            new = step if lo < step < hi else float(np.sqrt(lo * hi))
            if abs(new - beta) <= 1e-9 * beta:
                break
            beta = new
        start = beta
        return float(-log_p[index].mean())

    return loss


def _total_variation(z: F64, variance: Callable[[float], F64]) -> Criterion:
    """Mean over rows of half the sum of |p - q|, frozen against probit predictive. It grows with
    the variance: the family in the logits' scale has monotone likelihood ratios."""
    p = np.exp(log_softmax(z))

    def distance(precision: float) -> float:
        scale = probit_scale(variance(precision), 1.0, 1.0)[:, None]
        return float(0.5 * np.abs(np.exp(log_softmax(z * scale)) - p).sum(1).mean())

    return distance


def gaussian_variation(ratio: F64) -> float:
    """Mean total variation of two centred Gaussians whose variances have this ratio >= 1."""
    log = np.log(np.maximum(ratio, 1 + 1e-12))
    cross = np.sqrt(log / -np.expm1(-log))  # where the densities meet, in the narrow one's units
    return float(2.0 * (ndtr(cross) - ndtr(cross * np.exp(-0.5 * log))).mean())
