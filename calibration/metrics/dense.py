"""What the figures of dense outputs share: which pixels count, and intervals over images.

Pixels of one image go together, so pooled pixels have no honest interval: a figure is worked out
per image (a column, 8 bytes an image) and the images are resampled. Figures that are sums over
pixels (``uce``, ``correlation``, ``class_calibration``) are folds over batches of maps instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.bootstrap import N_BOOT, Estimate, mean_estimates
from posthoc.contract import F64, Array, DataError
from posthoc.folds import Fold


def known_pixels(truth: Array, claim: Array, names: tuple[str, str]) -> tuple[Array, Array]:
    """Both maps (any one shape) as flat float arrays without the pixels whose truth is unknown.

    A NaN in ``truth``, something measured against ground truth such as an error, means that this
    pixel has none. Raises DataError for shapes that differ, for a NaN in ``claim``, what the model
    says of itself, at any other pixel, and for infinity; ``names`` are the two in the message.
    """
    t, c = (
        a if a.dtype.kind == "f" else a.astype(np.float64) for a in map(np.asarray, (truth, claim))
    )
    if t.shape != c.shape:
        raise DataError(f"{names[0]} has shape {t.shape} where {names[1]} has {c.shape}")
    t, c = t.reshape(-1), c.reshape(-1)
    unknown = np.isnan(t)
    if unknown.any():
        t, c = t[~unknown], c[~unknown]
    for name, x in zip(names, (t, c), strict=True):
        finite = np.isfinite(x)
        if not finite.all():
            raise DataError(f"{name} is {x[~finite][0]} at a pixel whose {names[0]} is no NaN")
    return t, c


def _append(table: Mapping[str, F64], batch: Mapping[str, Array]) -> Mapping[str, F64]:
    if not table:
        return {k: np.asarray(v, dtype=np.float64) for k, v in batch.items()}
    if set(batch) not in (set(table), set()):
        raise DataError(f"figures {sorted(batch)} follow images with {sorted(table)}")
    return {
        k: np.concatenate([v, np.asarray(batch[k], dtype=np.float64)]) if batch else v
        for k, v in table.items()
    }


image_figures: Fold[Mapping[str, F64], Mapping[str, Array], Mapping[str, F64]] = Fold(
    init=dict, update=_append, merge=_append, result=lambda table: table
)
"""The fold over batches ``{name: N figures}`` of N images: one long column for each name.

It keeps the order in which batches came, and pieces were merged.
"""


@dataclass(frozen=True, slots=True)
class ImageEstimate:
    """Mean of a figure over images with its interval, and how many images have the figure."""

    mean: Estimate
    images: int


def image_estimates(
    columns: Mapping[str, Array],
    *,
    groups: Array | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, ImageEstimate]:
    """Mean over images of each column (N figures) with its bootstrap interval over images.

    A NaN is an image for which the figure does not exist (a correlation over a constant map); it
    is left out and shows in ``images``. ``groups`` (N) names the subject of each image where
    there are several of one. A column without any figure is all NaN with ``images`` 0.
    """
    found = {}
    for name, column in columns.items():
        x = np.asarray(column, dtype=np.float64)
        if groups is not None and len(groups) != len(x):
            raise DataError(f"groups has {len(groups)} images where {name} has {len(x)}")
        exists = ~np.isnan(x)
        if not exists.any():
            found[name] = ImageEstimate(Estimate(np.nan, np.nan, np.nan), 0)
            continue
        kept = None if groups is None else np.asarray(groups)[exists]
        mean = mean_estimates(
            {name: x[exists]}, groups=kept, n_boot=n_boot, seed=seed, level=level
        )[name]
        found[name] = ImageEstimate(mean, int(exists.sum()))
    return found


@dataclass(frozen=True, slots=True)
class Uncovered:
    """How the share of uncovered pixels is spread over images.

    ``mean`` is what risk control promises to be at most alpha; ``above`` is the share of images
    whose own share exceeds alpha, and ``quantiles`` holds the shares that 50, 90 and 99 % of the
    images do not exceed: these are measured, not promised.
    """

    images: int
    mean: Estimate
    above: Estimate
    quantiles: tuple[float, float, float]


def share_uncovered(
    losses: Array,
    alpha: float,
    *,
    groups: Array | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
    level: float = 0.95,
) -> Uncovered:
    """Summary of the N shares that ``conformal.risk.image_losses`` gives, at the level alpha.

    Intervals resample images, or ``groups`` of them. Raises DataError for no images or a share
    outside [0, 1].
    """
    x = np.asarray(losses, dtype=np.float64)
    if not ((x >= 0) & (x <= 1)).all():
        raise DataError("a share of uncovered pixels lies outside [0, 1]")
    columns = {"mean": x, "above": x > alpha}
    found = mean_estimates(columns, groups=groups, n_boot=n_boot, seed=seed, level=level)
    q50, q90, q99 = np.quantile(x, [0.5, 0.9, 0.99], method="inverted_cdf")
    return Uncovered(len(x), found["mean"], found["above"], (float(q50), float(q90), float(q99)))
