"""Correlation of a map of uncertainty with the map of errors: pooled, and image by image.

Pooled over pixels it also rewards telling a hard image from an easy one; the mean over images
says how well a map finds the errors within an image. Pearson's coefficient of σ with |error| is
what BayesCap (Upadhyay et al. 2022, arXiv:2207.06873) reports as C.Coeff.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.dense import known_pixels
from posthoc.contract import F64, Array
from posthoc.folds import Fold

_NAMES = ("error", "uncertainty")


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, means and centred second moments (sums, not means) of pixels' pairs."""

    n: int = 0
    mean_error: float = 0.0
    mean_uncertainty: float = 0.0
    error_error: float = 0.0
    uncertainty_uncertainty: float = 0.0
    error_uncertainty: float = 0.0

    @property
    def pearson(self) -> float:
        """Pearson's correlation coefficient in -1…1; nan where one of the two is constant."""
        scale = math.sqrt(self.error_error) * math.sqrt(self.uncertainty_uncertainty)
        return max(-1.0, min(1.0, self.error_uncertainty / scale)) if scale > 0 else math.nan


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of pixels.

    Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1: no
    difference of large sums, so errors far from 0 lose no digits.
    """
    if not a.n or not b.n:
        return a if a.n else b
    n = a.n + b.n
    d_error = b.mean_error - a.mean_error
    d_uncertainty = b.mean_uncertainty - a.mean_uncertainty
    w = a.n * b.n / n
    return Moments(
        n,
        a.mean_error + d_error * b.n / n,
        a.mean_uncertainty + d_uncertainty * b.n / n,
        a.error_error + b.error_error + w * d_error * d_error,
        a.uncertainty_uncertainty + b.uncertainty_uncertainty + w * d_uncertainty**2,
        a.error_uncertainty + b.error_uncertainty + w * d_error * d_uncertainty,
    )


def _update(moments: Moments, batch: Mapping[str, Array]) -> Moments:
    error, uncertainty = known_pixels(batch["error"], batch["uncertainty"], _NAMES)
    return merge(moments, _moments(error, uncertainty))


pooled_moments: Fold[Moments, Mapping[str, Array], Moments] = Fold(
    init=Moments, update=_update, merge=merge, result=lambda moments: moments
)
"""The fold over batches ``{"error": …, "uncertainty": …}`` of maps of one shape.

A NaN error is a pixel without truth and is left out.
"""


def pearson(error: Array, uncertainty: Array) -> float:
    """Pearson's coefficient over the pixels of two maps; nan where one of them is constant."""
    return _update(Moments(), {"error": error, "uncertainty": uncertainty}).pearson


def spearman(error: Array, uncertainty: Array) -> float:
    """Spearman's rank coefficient over the pixels of two maps, ties sharing their mean rank.

    It needs all pixels at once (24 bytes each); nan where a map is constant.
    """
    e, u = known_pixels(error, uncertainty, _NAMES)
    return _moments(_ranks(e), _ranks(u)).pearson


def image_correlations(error: Array, uncertainty: Array) -> dict[str, F64]:
    """Columns ``pearson`` and ``spearman`` of N images, maps N×…, for ``dense.image_figures``."""
    pairs = list(zip(np.asarray(error), np.asarray(uncertainty), strict=True))
    return {
        "pearson": np.array([pearson(e, u) for e, u in pairs], dtype=np.float64),
        "spearman": np.array([spearman(e, u) for e, u in pairs], dtype=np.float64),
    }


def _moments(error: Array, uncertainty: Array) -> Moments:
    n = len(error)
    if not n:
        return Moments()
    e, u = error.astype(np.float64), uncertainty.astype(np.float64)
    mean_e, mean_u = float(e.mean()), float(u.mean())
    # A mean of n equal numbers may round away from them: a constant map must have no variance.
    e -= e[0] if e.min() == e.max() else mean_e
    u -= u[0] if u.min() == u.max() else mean_u
    return Moments(n, mean_e, mean_u, float(e @ e), float(u @ u), float(e @ u))


def _ranks(x: Array) -> F64:
    """Ranks from 0, equal numbers sharing the mean of theirs."""
    order = np.argsort(x)
    ordered = x[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(x)])
    sizes = np.diff(starts, append=len(x))
    ranks = np.empty(len(x))
    if len(starts) == len(x):
        ranks[order] = np.arange(len(x))
    else:
        ranks[order] = np.repeat(starts + (sizes - 1) / 2, sizes)
    return ranks
