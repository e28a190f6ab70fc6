"""What the evaluations of segmentation and image regression share: columns with a figure an image.

An image is what is resampled (or its split key, where several share one), never a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from calibration.evaluation.parts import IN_ROWS, Resampling, figure, figures, ood_results
from calibration.evaluation.records import (
    Figure,
    Histogram,
    ImageShares,
    Level,
    OodResult,
    Sparsified,
)
from calibration.metrics.bootstrap import group_codes
from calibration.metrics.dense import image_estimates, share_uncovered
from calibration.metrics.sparsification import REMOVED, Sparsification
from calibration.metrics.totals import level_name
from posthoc.contract import F64, Array, DataError

SAMPLED = 256  # pixels drawn from an image for figures that need all of them at once
PIXELS = "{}, pixel by pixel"
_BAND = 2.576  # normal 99 %


class Columns:
    """Figures of images by name, appended image by image."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """One image's figures; NaN for one that it does not have. Every image has all names."""
        if self.values and figures.keys() != self.values.keys():
            raise DataError(f"figures {sorted(figures)} follow images with {sorted(self.values)}")
        for name, value in figures.items():
            self.values.setdefault(name, []).append(float(value))

    def __getitem__(self, name: str) -> F64:
        return np.asarray(self.values[name], dtype=np.float64)

    def arrays(self) -> dict[str, F64]:
        """Every column, N."""
        return {name: self[name] for name in self.values}


class Curves:
    """The mean over images of their sparsification curves."""

    def __init__(self) -> None:
        self.images = 0
        self.curve = np.zeros(len(REMOVED))
        self.oracle = np.zeros(len(REMOVED))

    def add(self, one: Sparsification) -> dict[str, float]:
        """One image's curve, unless it has no error at all; its ``ause`` and ``ause_random``."""
        if not math.isnan(one.ause):
            self.images += 1
            self.curve = self.curve + one.curve
            self.oracle = self.oracle + one.oracle
        return {"ause": one.ause, "ause_random": one.random}

    def record(self, name: str) -> tuple[Sparsified, ...]:
        """The mean curve; nothing where no image had an error."""
        if not self.images:
            return ()
        x, y, oracle = REMOVED, self.curve / self.images, self.oracle / self.images
        return (
            Sparsified(
                name=name, x=tuple(x.tolist()), y=tuple(y.tolist()), oracle=tuple(oracle.tolist())
            ),
        )


def image_figures(columns: Mapping[str, Array], resampling: Resampling) -> dict[str, Figure]:
    """Mean of each column over the images that have the figure, with its interval over images;
    a column that none has is left out."""
    groups, n_boot, seed = resampling
    whole = {name: c for name, c in columns.items() if not np.isnan(c).any()}
    rest = {name: c for name, c in columns.items() if name not in whole}
    found = figures(whole, resampling) if whole else {}
    some = image_estimates(rest, groups=groups, n_boot=n_boot, seed=seed)
    found |= {name: figure(e.mean) for name, e in some.items() if e.images}
    return {name: found[name] for name in columns if name in found}


def image_level(
    alpha: float,
    losses: Array,
    n_conformal: int,
    sizes: Array,
    resampling: Resampling,
    *,
    empty_share: float | None = None,
    ambiguous: Array | None = None,
    everything: bool = False,
    mask: str | None = None,
    excess: Array | None = None,
) -> Level:
    """Coverage at ``alpha`` from the N images' shares of uncovered pixels and mean sizes.

    The band is that of a healthy bundle: risk control leaves an expected share between
    alpha - 2/(n+1) and alpha (Angelopoulos et al. 2024, "Conformal risk control", Theorems 1
    and 2), and the luck of both samples is normal: ``s sqrt(1/n + 1/m)`` for n conformal and m
    test images whose shares have standard deviation s. ``everything``: an infinite threshold.
    ``mask`` names the class whose missed pixels are the loss, NaN in an image without it, and
    ``excess`` is the share of the mask that is of other classes, NaN for an empty mask.
    """
    x = np.asarray(losses, dtype=np.float64)
    shown = ~np.isnan(x)
    groups, n_boot, seed = resampling
    x, groups = x[shown], None if groups is None else groups[shown]
    found = share_uncovered(x, alpha, groups=groups, n_boot=n_boot, seed=seed)
    codes, units = group_codes(groups, len(x))
    mine = np.bincount(codes, x - x.mean(), units)
    of_mean = math.sqrt(float((mine**2).sum()) * units / max(units - 1, 1)) / len(x)
    luck = _BAND * math.hypot(of_mean, float(x.std()) / math.sqrt(max(n_conformal, 1)))
    low, high = 1 - alpha - luck, 1 - alpha + 2 / (n_conformal + 1) + luck
    size = float(np.mean(sizes))
    extra = {} if excess is None else image_figures({"excess": excess}, resampling)
    shares = ImageShares(
        n=len(x),
        mask=mask,
        excess=extra.get("excess"),
        mean=figure(found.mean),
        above=figure(found.above),
        quantiles=found.quantiles,
        ambiguous=None
        if ambiguous is None
        else image_figures({"ambiguous": ambiguous}, resampling)["ambiguous"],
        histogram=_shares(
            f"{'uncovered' if mask is None else 'missed'} at level {level_name(alpha)}", x
        ),
    )
    return Level(
        level=level_name(alpha),
        alpha=alpha,
        coverage=1 - found.mean.value,
        band_low=1.0 if everything else max(0.0, low),
        band_high=1.0 if everything else min(1.0, high),
        mean_size=size if math.isfinite(size) else None,
        empty_share=empty_share,
        images=shares,
    )


def _shares(name: str, losses: F64) -> Histogram:
    """Shares of images by their share of uncovered pixels, in bins from 0 to the largest."""
    top = float(losses.max()) or 1.0
    edges = np.linspace(0, top, min(20, max(5, math.isqrt(len(losses)))) + 1)
    counts = np.histogram(losses, edges)[0]
    shares = {IN_ROWS: tuple((counts / len(losses)).tolist())}
    return Histogram(name=name, edges=tuple(edges.tolist()), shares=shares)


class ScoreMaps:
    """Scores of pixels of many images: each image's mean, and a few drawn pixels."""

    def __init__(self, per: int = SAMPLED) -> None:
        self.per = per
        self.means: dict[str, list[float]] = {}
        self.drawn: dict[str, list[Array]] = {}
        self.sizes: list[int] = []
        self.groups: list[int] = []

    def add(self, maps: Mapping[str, Array], key: int, group: int) -> None:
        """The maps (P each) of one image; ``key`` is its content hash, ``group`` its split key."""
        for name, score in maps.items():
            index = drawn_pixels(key, len(score), self.per)
            self.means.setdefault(name, []).append(float(score.mean(dtype=np.float64)))
            self.drawn.setdefault(name, []).append(score[index])
        self.sizes.append(min([self.per, *(len(s) for s in maps.values())]))
        self.groups.append(group)

    def images(self) -> dict[str, Array]:
        """Mean score of each image, N."""
        return {name: np.asarray(m) for name, m in self.means.items()}

    def pixels(self) -> dict[str, Array]:
        """Scores of the drawn pixels, all images in a row."""
        return {PIXELS.format(name): np.concatenate(d) for name, d in self.drawn.items()}

    def image_of_pixel(self) -> Array:
        """The group of each drawn pixel: of one image (or split key) none is independent."""
        return np.repeat(np.asarray(self.groups, np.uint64), self.sizes)


def drawn_pixels(key: int, count: int, per: int) -> Array:
    """At most ``per`` of ``count`` pixels, uniform, without replacement, by the image's key."""
    if count <= per:
        return np.arange(count)
    return np.random.default_rng(key).choice(count, per, replace=False)


def ood_maps(
    inside: ScoreMaps, outside: Mapping[str, ScoreMaps], grouped: bool
) -> tuple[tuple[OodResult, ...], tuple[Histogram, ...]]:
    """Each score told image by image (the mean of its map) and pixel by pixel (drawn pixels)."""
    by_image = ood_results(
        inside.images(),
        {name: s.images() for name, s in outside.items()},
        np.asarray(inside.groups, np.uint64) if grouped else None,
        {name: np.asarray(s.groups, np.uint64) for name, s in outside.items()} if grouped else None,
    )
    if not outside:
        return by_image
    by_pixel = ood_results(
        inside.pixels(),
        {name: s.pixels() for name, s in outside.items()},
        inside.image_of_pixel(),
        {name: s.image_of_pixel() for name, s in outside.items()},
    )
    return by_image[0] + by_pixel[0], by_image[1] + by_pixel[1]
