"""Split-conformal intervals of a regression, of several outputs jointly.

A score says how far the truth lies outside what the predictive distribution expects; the interval
is all that scores at most the threshold. Per output k, with r = (y - mean) / std:

- ``residual``: |r|, an interval mean ± q std (Lei et al. 2018);
- ``absolute``: |y - mean| / scale, one width for all rows;
- ``cqr``: (|y - mean| - a std) / scale, which widens by a constant the central interval that the
  distribution itself has, mean ± a std (Romano, Patterson & Candès 2019, arXiv:1905.03222);
- ``cdf``: |R(F(y)) - 1/2|, between two quantiles of the distribution recalibrated by R, which may
  lie unlike far from the mean (Chernozhukov, Wüthrich & Zhu 2021, arXiv:1909.07889).

Several outputs: the largest score of a row, so that all are covered together (Diquigiovanni et al.
2022). One-sided intervals take the signed score and have one end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from posthoc.contract import F64, Array, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
INTERVALS = ("residual", "absolute", "cqr", "cdf")
# A graph's ends are rounded outward, relative to their terms: more than what float32 loses on the
# way, so that targets which tie at the threshold (prices, counts) do not all fall out of it.
OUTWARD = 2.0**-22
Side = Literal["two", "lower", "upper"]


@dataclass(frozen=True, slots=True)
class Interval:
    """How intervals are made. ``margin`` is cqr's a; ``tensors`` hold ``scale`` K (absolute, cqr)
    or ``levels`` M and ``factors`` M×K (cdf: recalibrated levels, and r at them, ascending)."""

    method: str = "residual"
    side: Side = "two"
    margin: float = 0.0
    tensors: Mapping[str, F64] = field(default_factory=dict)


def residual_scores(y: Array, mean: Array, std: Array) -> F64:
    """Scores N of normalised residuals from targets, means and standard deviations N×K."""
    return np.asarray(np.abs(signed_residuals(y, mean, std)).max(1))


def signed_residuals(y: Array, mean: Array, std: Array) -> F64:
    """``(y - mean) / std``, N×K, in float64."""
    return (np.asarray(y, np.float64) - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)


def interval_scores(interval: Interval, y: Array, mean: Array, std: Array) -> F64:
    """Scores N of targets, means and standard deviations N×K; a row is covered where its score is
    at most the threshold."""
    r, s = signed_residuals(y, mean, std), np.asarray(std, np.float64)
    if interval.method == "cdf":
        levels, factors = interval.tensors["levels"], interval.tensors["factors"]
        p = np.stack([np.interp(r[:, k], factors[:, k], levels) for k in range(r.shape[1])], axis=1)
        # Beyond the outer knots every target scores more than a finite threshold can reach.
        p = np.where(r < factors[0], -1.0, np.where(r > factors[-1], 2.0, p))
        return np.asarray(_sided(p - 0.5, interval.side).max(1))
    away = _sided(r, interval.side)
    if interval.method == "residual":
        return np.asarray(away.max(1))
    return np.asarray(((away - interval.margin) * s / interval.tensors["scale"]).max(1))


def bounds(interval: Interval, q: Array, mean: Array, std: Array) -> tuple[F64, F64]:
    """(lower, upper) N×K at thresholds q N×1; an end that is not bounded is infinite. An interval
    that would be less than nothing is its middle."""
    mean, std, q = (np.asarray(v, np.float64) for v in (mean, std, q))
    q = np.broadcast_to(q, (len(mean), 1))
    if interval.method == "cdf":
        low, high = (_factors(interval, sign * q) for sign in (-1.0, 1.0))
        lower, upper = mean + std * low, mean + std * high
    else:
        width = interval.tensors.get("scale", std)
        half = interval.margin * std + q * width
        if interval.side == "two" and interval.method == "cqr":
            half = np.maximum(half, 0.0)
        lower, upper = mean - half, mean + half
    if interval.side == "two":
        return lower, upper
    endless = np.full(mean.shape, np.inf)
    return (-endless, upper) if interval.side == "upper" else (lower, endless)


def emit_bounds(interval: Interval, g: Fragment, q: str, mean: str, std: str) -> tuple[str, str]:
    """The same as a graph fragment; ``q`` N×1, or 1×1."""
    if interval.method == "cdf":
        ends = []
        for sign in (-1.0, 1.0):
            factor = _emit_factors(interval, g, g.op("Mul", q, g.const(sign)))
            ends.append(emit_end(g, mean, g.op("Mul", std, factor), sign))
        lower, upper = ends
    else:
        scale = interval.tensors.get("scale")
        half = g.op("Mul", q, std if scale is None else g.const(scale[None]))
        if interval.margin:
            half = g.op("Add", half, g.op("Mul", std, g.const(interval.margin)))
        if interval.side == "two" and interval.method == "cqr":
            half = g.op("Max", half, g.const(0.0))
        lower = emit_end(g, mean, g.op("Neg", half), -1.0)
        upper = emit_end(g, mean, half, 1.0)
    if interval.side == "two":
        return lower, upper
    nothing = g.op("Mul", std, g.const(np.inf))
    if interval.side == "upper":
        return g.op("Neg", nothing), upper
    return lower, nothing


def emit_end(g: Fragment, mean: str, away: str, sign: float = 1.0) -> str:
    """``mean + away``, rounded down where the sign is negative and up where it is positive."""
    terms = g.op("Add", g.op("Abs", mean), g.op("Abs", away))
    end = g.op("Add", mean, away)
    return g.op("Add", end, g.op("Mul", terms, g.const(sign * OUTWARD)))


def make(
    method: str,
    side: Side,
    noise: Array,
    margin: float,
    recalibrated: tuple[F64, F64] | None = None,
) -> Interval:
    """An interval for outputs of noise variance K; ``margin`` is a quantile of the standardised
    distribution, for cqr; ``recalibrated`` levels M and factors M×K, for cdf."""
    if method not in INTERVALS:
        raise FitError(f"unknown interval {method!r}; there are {', '.join(INTERVALS)}")
    if method == "residual":
        return Interval(method, side)
    if method == "cdf":
        assert recalibrated is not None
        levels, factors = recalibrated
        # A graph looks thresholds up among levels less a half, which float32 must then hold.
        levels = 0.5 + (levels - 0.5).astype(np.float32).astype(np.float64)
        return Interval(method, side, 0.0, {"levels": levels, "factors": factors})
    scale = {"scale": np.sqrt(np.asarray(noise, np.float64))}
    return Interval(method, side, margin if method == "cqr" else 0.0, scale)


def quantile_factors(signed: Array, levels: Sequence[float] = QUANTILE_LEVELS) -> F64:
    """K×Q factors r of ``mean + std r``: order statistics at rank ceil((n+1) level), at most n."""
    s = np.sort(np.asarray(signed, np.float64), axis=0)
    n = len(s)
    ranks = [min(n, int(np.ceil(round((n + 1) * q, 9)))) for q in levels]
    return np.asarray(s[[r - 1 for r in ranks]].T)


def _sided(signed: F64, side: Side) -> F64:
    return np.abs(signed) if side == "two" else signed if side == "upper" else -signed


def _factors(interval: Interval, q: F64) -> F64:
    """The r N×K at the recalibrated level 1/2 + q; infinite beyond the outer knots."""
    levels, factors = interval.tensors["levels"], interval.tensors["factors"]
    p = 0.5 + q[:, 0]
    found = np.stack([np.interp(p, levels, factors[:, k]) for k in range(factors.shape[1])], axis=1)
    beyond = np.where(p > levels[-1], np.inf, np.where(p < levels[0], -np.inf, 0.0))
    return np.asarray(found + beyond[:, None])


def _emit_factors(interval: Interval, g: Fragment, q: str) -> str:
    """`_factors`: the line between two knots, by the count of levels below."""
    from posthoc.graph import emit_count_below

    levels, factors = interval.tensors["levels"] - 0.5, interval.tensors["factors"]
    k = factors.shape[1]
    slopes = np.diff(factors, axis=0) / np.diff(levels)[:, None]
    none = np.zeros((1, k))
    q = g.op("Squeeze", q, g.const([1], "int64"))
    index = g.cast(emit_count_below(g, levels, q), "int64")
    # A line is read from the knot that is nearer the middle, where float32 has more digits.
    anchor = np.where(levels[:-1] < 0, np.arange(1, len(levels)), np.arange(len(levels) - 1))
    tables = (
        np.concatenate([none, slopes, none]),
        np.concatenate([none - np.inf, factors[anchor], none + np.inf]),
        np.concatenate([levels[:1], levels[anchor], levels[-1:]])[:, None],
    )
    slope, start, level = (g.op("Gather", g.const(t), index, axis=0) for t in tables)
    # The first level itself has no level below it.
    first = g.op("LessOrEqual", g.op("Abs", g.op("Sub", q, g.const(levels[0]))), g.const(0.0))
    start = g.op("Where", g.unsqueeze(first, 1), g.const(factors[:1]), start)
    far = g.const(100.0)  # a level that is infinite must not make a NaN of its slope
    step = g.op("Sub", g.op("Max", g.op("Min", g.unsqueeze(q, 1), far), g.op("Neg", far)), level)
    return g.op("Add", start, g.op("Mul", slope, step))
