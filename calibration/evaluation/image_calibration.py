"""Calibration error of maps: images are the independent evidence, and their pixels are not.

Of image i the gap in confidence bin b is ``g_ib``, its right pixels less the sum of their
confidences. For a calibrated model each gap has mean 0 and the images are independent, however
its pixels hang together, so the variance of a bin's gap is estimated by ``sum_i g_ib²`` (Liang &
Zeger 1986, "Longitudinal data analysis using generalized linear models", with the null imposed).
That variance takes the place of ``c(1-c)/n`` in `calibration_error.debiased_ece`. The band of a
perfect model gives every image's gaps a random sign (the wild bootstrap over clusters: Cameron,
Gelbach & Miller 2008, "Bootstrap-based improvements for inference with clustered errors").
Every pixel counts alike, in the 20 bins of ``totals.bin_index``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from calibration.metrics.bootstrap import N_BOOT, Estimate, group_codes, row_weights
from calibration.metrics.calibration_error import PerfectBand
from calibration.metrics.totals import N_BINS, bin_index
from posthoc.contract import F64, Array, DataError


@dataclass(frozen=True, slots=True)
class ImageBins:
    """Sums over the pixels of each image (or subject) by confidence bin, U×20 each."""

    count: F64
    right: F64
    confidence: F64

    @property
    def gap(self) -> F64:
        """Right pixels less their confidences, U×20."""
        return self.right - self.confidence


def pixel_bins(confidence: Array, right: Array) -> F64:
    """Count, right and confidence sum by bin, 3×20, of the P pixels of one image."""
    index = bin_index(confidence)
    return np.stack(
        [
            np.bincount(index, minlength=N_BINS).astype(np.float64),
            np.bincount(index, np.asarray(right, np.float64), N_BINS),
            np.bincount(index, np.asarray(confidence, np.float64), N_BINS),
        ]
    )


def image_bins(images: Array, groups: Array | None = None) -> ImageBins:
    """The ``pixel_bins`` of N images, N×3×20, added up by group where there are groups (N)."""
    codes, units = group_codes(groups, len(images))
    sums = np.zeros((units, 3, N_BINS))
    np.add.at(sums, codes, np.asarray(images, np.float64))
    return ImageBins(sums[:, 0], sums[:, 1], sums[:, 2])


def plug_in_ece(bins: ImageBins) -> float:
    """``sum_b |sum_i g_ib| / n``: the usual figure over all pixels, with its upward bias."""
    return float(np.abs(bins.gap.sum(0)).sum() / bins.count.sum())


def debiased_ece(bins: ImageBins) -> float:
    """ECE less what sampling noise of so many images adds to it; around 0 for a perfect model."""
    gap = bins.gap
    return float(_debiased(bins.count.sum(0), gap.sum(0), (gap**2).sum(0)))


def perfect_band(
    bins: ImageBins, *, n_sim: int = N_BOOT, seed: int = 0, level: float = 0.95
) -> PerfectBand:
    """Where the figures of a calibrated model with the same confidences and images lie.

    For a model far from calibrated it is somewhat wide: its own gaps are what is given signs.
    """
    rng, own = np.random.default_rng(seed), bins.gap
    gaps = np.array([rng.choice([-1.0, 1.0], len(own)) @ own for _ in range(n_sim)])
    count, square = bins.count.sum(0), (bins.gap**2).sum(0)
    tails = [(1 - level) / 2, (1 + level) / 2]
    ece = np.quantile(np.abs(gaps).sum(1) / count.sum(), tails)
    debiased = np.quantile(_debiased(count, gaps, square), tails)
    filled = count > 0
    accuracy = np.full((2, N_BINS), math.nan)
    claimed = bins.confidence.sum(0)[filled]
    spread = (claimed + np.quantile(gaps[:, filled], tails, axis=0)) / count[filled]
    accuracy[:, filled] = np.clip(spread, 0, 1)
    return PerfectBand(
        (float(ece[0]), float(ece[1])),
        (float(debiased[0]), float(debiased[1])),
        accuracy[0],
        accuracy[1],
    )


def ece_difference(
    a: ImageBins, b: ImageBins, *, n_boot: int = N_BOOT, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Debiased ECE of a less that of b on the same images; a normal interval around it with the
    standard deviation of the paired bootstrap over images."""
    if a.count.shape != b.count.shape:
        raise DataError("a paired difference needs the same images on both sides")
    sums = np.concatenate([y for x in (a, b) for y in (x.count, x.gap, x.gap**2)], axis=1)
    weights = row_weights(len(sums), groups=None, n_boot=n_boot, seed=seed)
    drawn = np.array([sums.sum(0), *(w @ sums for w in weights)])
    of, to = (_debiased(*np.split(half, 3, axis=1)) for half in np.split(drawn, 2, axis=1))
    value = float(of[0] - to[0])
    half = NormalDist().inv_cdf((1 + level) / 2) * float(np.std((of - to)[1:]))
    return Estimate(value, value - half, value + half)


def _debiased(count: F64, gap: F64, square: F64) -> F64:
    """Of sums over images by bin (…×20), one figure for each leading index."""
    n = np.maximum(count, 1.0)  # an empty bin has no gap either
    d = np.abs(gap) / n
    # A bin of certainties cannot scatter; the floor only keeps 0/0 out of the exponent.
    s = np.sqrt(np.maximum(square, 1e-30)) / n
    noise = 2 / math.sqrt(math.pi) * s * np.exp(-0.5 * (d / s) ** 2)
    figure: F64 = (count * (d - noise)).sum(-1) / count.sum(-1)
    return figure
