"""Recalibration of a regression's distribution function by its own probability integral transforms.

F' = R ∘ F, R the distribution of Z = F(y | x) over conformal rows (Kuleshov, Fenner & Ermon 2018,
arXiv:1807.00263; Dheur & Ben Taieb 2023, arXiv:2306.02738). ``emp`` takes R's quantile at level a
to be the ceil((n+1) a)-th of the Z: a new truth lies at or below it with probability at least a,
exactly ceil((n+1) a) / (n+1) without ties, whatever the model (split conformal with the score
F(y | x)). ``linear`` interpolates through (Z_(i), i / (n+1)) and ``kde`` smooths by a logistic
mixture reflected at 0 and 1; both are as good as the empirical one in the mean and promise nothing.
Only ``kde`` has a density everywhere, and so a likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import expit
from scipy.stats import norm
from scipy.stats import t as student

from posthoc.contract import F64, I64, Array, FitError

if TYPE_CHECKING:
    from calibration.head import Head

Kind = Literal["emp", "linear", "kde"]
SHARPNESS = 100.0  # of the logistic kernel, one over its scale
KNOTS = 255  # of the map between levels and factors that an interval keeps
BEYOND = 10.0  # ranges of the knots that a line goes on to either side
TRANSFORMS = "transforms"  # K×n, ascending, beside a bundle's conformal scores: kde has a density
_EDGE = 1e-9
_BRACKETS, _STEPS, _EXACT = 256, 40, 1e-10  # of the search for a level of kde


@dataclass(frozen=True, slots=True)
class Base:
    """The distribution of r = (y - mean) / std: Student-t of unit variance with ``df`` > 2, or the
    normal."""

    df: float = math.inf

    def cdf(self, r: Array) -> F64:
        """P(R <= r)."""
        if math.isinf(self.df):
            return np.asarray(norm.cdf(r))
        return np.asarray(student.cdf(np.asarray(r) / self._scale, self.df))

    def quantile(self, p: Array) -> F64:
        """The r at levels p; infinite at 0 and 1."""
        if math.isinf(self.df):
            return np.asarray(norm.ppf(p))
        return np.asarray(student.ppf(p, self.df) * self._scale)

    def log_density(self, r: Array) -> F64:
        """Of r."""
        if math.isinf(self.df):
            return np.asarray(norm.logpdf(r))
        scale = self._scale
        return np.asarray(student.logpdf(np.asarray(r) / scale, self.df) - math.log(scale))

    @property
    def _scale(self) -> float:
        return math.sqrt((self.df - 2) / self.df)


def base_of(head: Head) -> Base:
    """The distribution that a regression's head predicts with."""
    df = math.inf if head.module is None else float(head.module[1].settings.get("df", math.inf))
    return Base(df)


@dataclass(frozen=True, slots=True)
class Recalibration:
    """R of one output: its transforms Z ascending, n of them."""

    kind: Kind
    z: F64

    def level(self, a: Array) -> F64:
        """R⁻¹: the levels of F at which the recalibrated distribution has levels ``a``."""
        a = np.asarray(a, np.float64)
        n = len(self.z)
        if self.kind == "emp":
            return np.asarray(self.z[_ranks(a, n) - 1])
        if self.kind == "linear":
            steps = np.arange(n + 2) / (n + 1)
            return np.asarray(np.interp(a, steps, np.concatenate([[0.0], self.z, [1.0]])))
        return _inverse(self, a)

    def map(self, u: Array) -> F64:
        """R: the recalibrated levels of levels ``u`` of F."""
        u = np.asarray(u, np.float64)
        n = len(self.z)
        if self.kind == "emp":
            return np.asarray(np.searchsorted(self.z, u, side="right") / (n + 1))
        if self.kind == "linear":
            steps = np.arange(n + 2) / (n + 1)
            return np.asarray(np.interp(u, np.concatenate([[0.0], self.z, [1.0]]), steps))
        return self._reflected(u, lambda x: np.asarray(expit(SHARPNESS * x)))

    def log_density(self, u: Array) -> F64:
        """log of R's derivative at u, which only ``kde`` has everywhere."""
        if self.kind != "kde":
            raise FitError(f"{self.kind} recalibration has no density; take kde")

        def kernel(x: F64) -> F64:
            p = expit(SHARPNESS * x)
            return np.asarray(SHARPNESS * p * (1 - p))

        u = np.asarray(u, np.float64)
        return np.asarray(np.log(np.maximum(self._density(u, kernel), 1e-300)))

    def _density(self, u: F64, kernel: Callable[[F64], F64]) -> F64:
        total = np.zeros(u.shape)
        for part in np.array_split(self.z, max(1, len(self.z) // 256)):
            x = u[..., None]
            total += (kernel(x - part) + kernel(x + part) + kernel(x + part - 2)).sum(-1)
        return np.asarray(total / self._mass())

    def _reflected(self, u: F64, cdf: Callable[[F64], F64]) -> F64:
        """The mixture's mass in [0, u], kernels reflected at both ends, over that in [0, 1]."""
        total = np.zeros(u.shape)
        for part in np.array_split(self.z, max(1, len(self.z) // 256)):
            x = u[..., None]
            for centre in (part, -part, 2 - part):
                total += (cdf(x - centre) - cdf(-centre)).sum(-1)
        return np.asarray(np.clip(total / self._mass(), 0.0, 1.0))

    def _mass(self) -> float:
        total = 0.0
        for centre in (self.z, -self.z, 2 - self.z):
            inside = expit(SHARPNESS * (1 - centre)) - expit(-SHARPNESS * centre)
            total += float(inside.sum())
        return total


def recalibrate(kind: Kind, base: Base, signed: Array) -> tuple[Recalibration, ...]:
    """R of each output from standardised errors N×K. FitError for no rows, or one that is NaN."""
    r = np.asarray(signed, np.float64)
    if len(r) == 0:
        raise FitError("a recalibration needs rows and has none")
    holes = np.isnan(r).any(axis=1)
    if holes.any():
        raise FitError(f"a recalibration cannot rank row {int(holes.argmax())}: its error is NaN")
    return tuple(Recalibration(kind, np.sort(base.cdf(column))) for column in r.T)


def factors(base: Base, maps: Sequence[Recalibration], signed: Array, levels: Array) -> F64:
    """The r K×Q at recalibrated levels Q, ascending in them: ``mean + std r`` is the quantile.

    ``emp`` gives the errors' own order statistics, not their way through F and back. FitError for
    a level that needs more rows than there are.
    """
    levels = np.asarray(levels, np.float64)
    if maps[0].kind == "emp":
        s = np.sort(np.asarray(signed, np.float64), axis=0)
        return np.asarray(s[_ranks(levels, len(s)) - 1].T)
    inside = [np.clip(m.level(levels), _EDGE, 1 - _EDGE) for m in maps]
    return np.maximum.accumulate(np.stack([base.quantile(p) for p in inside]), axis=1)


def log_density(base: Base, transforms: Array, signed: Array, std: Array) -> F64:
    """Log-density N×K of targets under the distribution that ``kde`` recalibrates, from the sorted
    ``transforms`` K×n of conformal rows, and standardised errors and standard deviations N×K:
    log f(y) + log R'(F(y))."""
    r = np.asarray(signed, np.float64)
    out = base.log_density(r) - np.log(np.asarray(std, np.float64))
    for k, z in enumerate(transforms):
        out[:, k] += Recalibration("kde", z).log_density(base.cdf(r[:, k]))
    return np.asarray(out)


def knots(base: Base, signed: Array) -> tuple[F64, F64]:
    """(levels M, factors M×K) of the recalibrated distribution of calibration rows, strictly
    ascending both: what a ``cdf`` interval looks up.

    Beyond the outermost both go on in a straight line, the levels below 0 and above 1: a conformal
    threshold may lie there, and errors there must not tie.
    """
    n = len(signed)
    levels = np.linspace(0, 1, min(KNOTS, n) + 2)[1:-1]
    found = factors(base, recalibrate("linear", base, signed), signed, levels).T
    # Equal errors would stand on one another; a hair apart, a level has one factor.
    hair = 1e-6 * np.arange(len(levels))[:, None] * np.maximum(1.0, np.abs(found).max())
    found = found + hair
    reach = BEYOND * np.maximum(found[-1] - found[0], 1.0)
    levels = np.concatenate([levels[:1] - BEYOND, levels, levels[-1:] + BEYOND])
    return levels, np.concatenate([found[:1] - reach, found, found[-1:] + reach])


def _ranks(a: F64, n: int) -> I64:
    """Of the order statistics at levels ``a``, from 1; FitError where it would be the n+1-st."""
    rank = np.ceil(np.round((n + 1) * a, 9)).astype(np.int64)
    if (rank > n).any():
        top = float(a[rank > n].min())
        least = "endless" if top >= 1 else f"at least {math.ceil(round(top / (1 - top), 9))}"
        raise FitError(
            f"a quantile at level {top:g} needs {least} conformal rows and there are {n}; "
            "leave it out of --quantiles, or take --recalibration linear, which promises nothing"
        )
    return np.maximum(rank, 1)


def _inverse(r: Recalibration, a: F64) -> F64:
    """The u with R(u) = a, by Newton's steps inside a bracket that only shrinks."""
    knots = np.linspace(0, 1, _BRACKETS + 1)
    at = r.map(knots)
    a = np.clip(a, 0.0, 1.0)
    right = np.clip(np.searchsorted(at, a), 1, _BRACKETS)
    low, high = knots[right - 1], knots[right]
    u = np.asarray(np.interp(a, at, knots))
    for _ in range(_STEPS):
        beyond = r.map(u) - a
        if np.abs(beyond).max(initial=0.0) < _EXACT:
            break
        low, high = np.where(beyond > 0, low, u), np.where(beyond > 0, u, high)
        u = u - beyond / np.exp(r.log_density(u))
        u = np.where((u >= low) & (u <= high), u, (low + high) / 2)
    return np.where((a > 0) & (a < 1), u, a)
