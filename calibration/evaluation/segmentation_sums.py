"""What one system (frozen, scaled, hedged) says of segmented images: its sums and its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from calibration.evaluation.image_calibration import (
    ImageBins,
    debiased_ece,
    image_bins,
    perfect_band,
    pixel_bins,
    plug_in_ece,
)
from calibration.evaluation.images import Columns, Curves, image_figures
from calibration.evaluation.parts import Resampling, against, reliability
from calibration.evaluation.records import Figure, System
from calibration.metrics.bootstrap import row_weights
from calibration.metrics.class_calibration import ClassTotals, class_bins
from calibration.metrics.proper import brier_score
from calibration.metrics.ranking import auroc
from calibration.metrics.sparsification import sparsification
from posthoc.contract import F64, Array
from posthoc.folds import log_loss_of_probs


class Rated(NamedTuple):
    """What one system says of the labelled pixels of one image."""

    label: Array
    confidence: Array
    probs: Array


class Sums:
    """Running sums of one system."""

    def __init__(self, classes: int):
        self.fold = class_bins(classes, axis=-1)
        self.columns, self.curves = Columns(), Curves()
        self.bins: list[F64] = []
        self.both: list[Array] = []
        self.either: list[Array] = []
        self.totals: ClassTotals = self.fold.init()

    def add(self, r: Rated, y: Array, more: Mapping[str, float]) -> None:
        """One image: its labelled pixels, their classes (P) and further figures of it by name."""
        right = r.label == y
        classes = r.probs.shape[1]
        unsure = -r.confidence.astype(np.float64)
        said, true = (np.bincount(x, minlength=classes) for x in (r.label, y))
        both = np.bincount(y[right], minlength=classes)
        mixed = right.any() and not right.all()
        self.columns.add(
            {
                "accuracy": float(right.mean()),
                "nll": float(log_loss_of_probs(r.probs, y).mean()),
                "brier": float(brier_score(r.probs, y).mean()),
                "error_auroc": auroc(unsure[right], unsure[~right]) if mixed else math.nan,
                **self.curves.add(sparsification((~right).astype(np.float64), unsure)),
                **more,
            }
        )
        self.bins.append(pixel_bins(r.confidence, right))
        self.both.append(both)
        self.either.append(said + true - both)
        self.totals = self.fold.update(self.totals, {"probs": r.probs, "y": y})

    def image_bins(self, groups: Array | None) -> ImageBins:
        """Confidence bins image by image, or by group of them (N)."""
        return image_bins(np.stack(self.bins), groups)


def record(name: str, s: Sums, bins: ImageBins, how: Resampling) -> System:
    """The column of the comparison."""
    band = perfect_band(bins, seed=how.seed)
    found = image_figures(s.columns.arrays(), how)
    first = {k: found.pop(k) for k in ("accuracy",)}
    metrics = {
        **first,
        "mean_iou": _mean_iou(np.stack(s.both), np.stack(s.either), how),
        **{k: found.pop(k) for k in ("nll", "brier")},
        "debiased_ece": against(debiased_ece(bins), band.debiased_ece),
        "ece": against(plug_in_ece(bins), band.ece),
        "class_ece": Figure(value=s.totals.static),
        **found,
    }
    count, right, claimed = (x.sum(0) for x in (bins.count, bins.right, bins.confidence))
    return System(name=name, metrics=metrics, reliability=reliability(count, right, claimed, band))


def _mean_iou(both: Array, either: Array, how: Resampling) -> Figure:
    """Mean over classes that occur of pooled intersection over union, with its interval."""
    value = float(np.nanmean(iou(both.sum(0), either.sum(0))))
    weights = row_weights(len(both), groups=how.groups, n_boot=how.n_boot, seed=how.seed)
    drawn = [np.nanmean(iou(w @ both, w @ either)) for w in weights]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Figure(value=value, low=float(low), high=float(high))


def iou(both: Array, either: Array) -> F64:
    """Intersection over union of each class; NaN for one that neither occurs nor is said."""
    found: F64 = np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
    return found
