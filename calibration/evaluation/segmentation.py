"""Evaluate segmentations: class maps, probabilities, sets and scores, image by image.

Accuracy, log loss, Brier score and what is uncovered are means over images of each image's own
figure; intersection over union and calibration errors add up all pixels. Intervals and the band of
a perfect model resample images. Pixels without a label count nowhere, except in score maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibration.evaluation.classification import FROZEN, SCALED
from calibration.evaluation.image_calibration import (
    ece_difference,
)
from calibration.evaluation.images import (
    SAMPLED,
    Columns,
    ScoreMaps,
    image_level,
    ood_maps,
)
from calibration.evaluation.parts import (
    HEDGED,
    Resampling,
    difference,
    differences,
    shares_of_sizes,
)
from calibration.evaluation.records import (
    Answered,
    ClassFigures,
    Dense,
    Evaluation,
    Level,
)
from calibration.evaluation.segmentation_sums import Rated, Sums, iou, record
from calibration.metrics.coverage import SetTotals, set_sizes
from calibration.metrics.energy_distance import energy_distance
from calibration.metrics.totals import level_name
from posthoc.contract import F64, Array, DataError


@dataclass(frozen=True, slots=True)
class Segmented:
    """A batch of N images of P pixels: what was said of them and what they are.

    ``probs`` N×P×C by system, ``frozen`` N×P the frozen argmax, ``label`` and ``confidence`` N×P of
    hedged, ``sets`` N×P×C by alpha,
    ``held`` N×P where flagged or abstained on, ``scores`` N×P by name, ``y`` N×P classes, -1 where
    there is none, ``annotations`` N×A×P of all annotators, ``keys`` and ``groups`` N hashes of
    content and split key.
    """

    probs: Mapping[str, Array]
    frozen: Array
    label: Array
    confidence: Array
    sets: Mapping[float, Array]
    y: Array
    keys: Array
    groups: Array
    scores: Mapping[str, Array] = field(default_factory=dict)
    held: Array | None = None
    annotations: Array | None = None

    def __len__(self) -> int:
        return len(self.y)


class Segmentation:
    """The figures of a segmentation, from batches; it holds a few hundred numbers an image."""

    def __init__(
        self,
        n_classes: int,
        alphas: Sequence[float],
        *,
        mask: int | None = None,
        per: int = SAMPLED,
    ):
        """``mask``: the class whose pixels the sets were promised to hold, not every pixel's."""
        self.classes, self.alphas, self.mask = n_classes, tuple(alphas), mask
        self.systems: dict[str, Sums] = {}
        self.sizes = {a: set_sizes(n_classes) for a in self.alphas}
        self.set_totals: dict[float, SetTotals] = {a: f.init() for a, f in self.sizes.items()}
        self.levels = {a: Columns() for a in self.alphas}
        self.scores = ScoreMaps(per)
        self.pixels = self.known = self.same = 0
        self.kept: F64 | None = None  # pixels kept, wrong and covered among them
        self.annotators = 0

    @property
    def n(self) -> int:
        """Images seen."""
        return len(self.scores.groups)

    @property
    def error(self) -> F64:
        """Share of wrong pixels of each image, N."""
        return 1 - self.systems[HEDGED].columns["accuracy"]

    def uncovered(self, alpha: float) -> F64:
        """Share of uncovered pixels of each image, N; of the mask's class, NaN without any."""
        return self.levels[alpha]["uncovered"]

    def add(self, batch: Segmented) -> None:
        """Take in a batch; DataError for an image without a labelled pixel."""
        for i in range(len(batch)):
            self._add(batch, i)

    def _add(self, batch: Segmented, i: int) -> None:
        known = batch.y[i] >= 0
        if not known.any():
            raise DataError(f"image {self.n} has no labelled pixel")
        y = batch.y[i][known].astype(np.int64)
        frozen = batch.frozen[i]
        self.same += int((frozen == batch.label[i]).sum())
        self.pixels += len(known)
        self.known += len(y)
        for name, maps in batch.probs.items():
            p = maps[i][known]
            label = (batch.label[i] if name == HEDGED else frozen)[known]
            confidence = (
                batch.confidence[i][known] if name == HEDGED else p[np.arange(len(p)), label]
            )
            more: dict[str, float] = {}
            if batch.annotations is not None:
                more = self._distance(batch.label[i] if name == HEDGED else frozen, batch, i)
            self.systems.setdefault(name, Sums(self.classes)).add(
                Rated(label, confidence, p), y, more
            )
        covered = {}
        for alpha, fold in self.sizes.items():
            inside = batch.sets[alpha][i][known]
            size = inside.sum(1)
            covered[alpha] = inside[np.arange(len(y)), y]
            self.set_totals[alpha] = fold.update(self.set_totals[alpha], {"set": inside, "y": y})
            figures = {
                "uncovered": 1 - covered[alpha].mean(),
                "size": size.mean(),
                "ambiguous": (size > 1).mean(),
            }
            self.levels[alpha].add(
                figures if self.mask is None else _missed(inside[:, self.mask], y == self.mask)
            )
        if batch.held is not None:
            kept = ~batch.held[i][known]
            wrong = (batch.label[i][known] != y)[kept].sum()
            inside = covered[self.alphas[0]][kept].sum() if self.alphas else 0
            sums = np.array([kept.sum(), wrong, inside], dtype=np.float64)
            self.kept = sums if self.kept is None else self.kept + sums
        scores = {name: s[i] for name, s in batch.scores.items()}
        self.scores.add(scores, int(batch.keys[i]), int(batch.groups[i]))

    def _distance(self, label: Array, batch: Segmented, i: int) -> dict[str, float]:
        """GED² of one label map, a deterministic model's only sample, to the annotators who
        labelled the image; class 0 is the background and does not count."""
        assert batch.annotations is not None
        found = batch.annotations[i]
        found = found[(found >= 0).any(1)]
        known = (found >= 0).all(0)
        self.annotators = max(self.annotators, len(found))
        if len(found) < 2 or not known.any():
            return {"ged": math.nan, "disagreement": math.nan}
        one = energy_distance(label[None, known], found[:, known], range(1, self.classes))
        return {"ged": one.squared, "disagreement": one.disagreement}

    def result(
        self,
        *,
        n_conformal: int,
        everything: Iterable[float] = (),
        strange: Mapping[str, ScoreMaps] | None = None,
        grouped: bool = False,
        classes: Sequence[str] | None = None,
        about: Mapping[str, str] | None = None,
        n_boot: int = 1000,
        seed: int = 0,
    ) -> Evaluation:
        """The evaluation. ``everything`` names levels whose threshold is infinite; ``grouped``:
        images of one split key are no independent evidence."""
        groups = np.asarray(self.scores.groups, np.uint64) if grouped else None
        how = Resampling(groups, n_boot, seed)
        bins = {name: s.image_bins(groups) for name, s in self.systems.items()}
        hedged = self.systems[HEDGED]
        columns = {n: s.columns.arrays() for n, s in self.systems.items()}
        compared = []
        for other in [name for name in (SCALED, FROZEN) if name in self.systems]:
            compared += differences(columns, ("nll", "brier"), other, how)
            gap = ece_difference(bins[HEDGED], bins[other], n_boot=n_boot, seed=seed)
            compared.append(difference("debiased_ece", other, gap))
        ood, scores = ood_maps(self.scores, strange or {}, grouped)
        return Evaluation(
            task="classification",
            about=dict(about or {}),
            n=self.n,
            n_conformal=n_conformal,
            label_equal=self.same / self.pixels,
            systems=tuple(record(n, s, bins[n], how) for n, s in self.systems.items()),
            differences=tuple(compared),
            levels=tuple(
                self._level(a, n_conformal, how, a in set(everything), classes)
                for a, c in self.levels.items()
                if not np.isnan(c["uncovered"]).all()
            ),
            set_sizes=()
            if self.mask is not None
            else tuple(shares_of_sizes(a, t) for a, t in self.set_totals.items()),
            answered=self._answered(),
            ood=ood,
            scores=scores,
            dense=Dense(
                pixels=self.known,
                sampled=self.scores.per,
                classes=self._classes(classes),
                sparsification=hedged.curves.record(HEDGED),
            ),
        )

    def _level(
        self,
        alpha: float,
        n_conformal: int,
        how: Resampling,
        everything: bool,
        names: Sequence[str] | None,
    ) -> Level:
        c = self.levels[alpha]
        more: dict[str, Any] = (
            {"empty_share": self.set_totals[alpha].empty_share, "ambiguous": c["ambiguous"]}
            if self.mask is None
            else {"mask": class_name(names, self.mask), "excess": c["excess"]}
        )
        return image_level(
            alpha, c["uncovered"], n_conformal, c["size"], how, everything=everything, **more
        )

    def _answered(self) -> Answered | None:
        if self.kept is None:
            return None
        kept, wrong, covered = self.kept.tolist()
        if not kept:
            return Answered(share=0.0)
        promised = self.mask is None and self.alphas
        return Answered(
            share=kept / self.known,
            error=wrong / kept,
            level=level_name(self.alphas[0]) if promised else None,
            coverage=covered / kept if promised else None,
        )

    def _classes(self, names: Sequence[str] | None) -> tuple[ClassFigures, ...]:
        hedged = self.systems[HEDGED]
        overlap = iou(np.sum(hedged.both, 0), np.sum(hedged.either, 0))
        errors = {name: s.totals.per_class for name, s in self.systems.items()}
        hits = hedged.totals.hits.sum(1) / self.known
        return tuple(
            ClassFigures(
                name=class_name(names, c),
                share=float(hits[c]),
                iou=None if math.isnan(overlap[c]) else float(overlap[c]),
                ece={name: float(e[c]) for name, e in errors.items()},
            )
            for c in range(self.classes)
        )


def class_name(names: Sequence[str] | None, c: int) -> str:
    """A class as the figures name it."""
    return f"class {c}" if names is None else names[c]


def _missed(inside: Array, true: Array) -> dict[str, float]:
    """Of one image: share of the class's pixels outside its mask, the mask's share of all pixels
    and the share of the mask that is of other classes."""
    return {
        "uncovered": float((~inside)[true].mean()) if true.any() else math.nan,
        "size": float(inside.mean()),
        "excess": float((~true)[inside].mean()) if inside.any() else math.nan,
    }
