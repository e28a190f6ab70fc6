"""One set of images of a dense bundle: the pass over it, its figures, its line among other sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calibration.bundle import Manifest
from calibration.evaluation.classification import FROZEN, SCALED
from calibration.evaluation.corrupted import Corrupted, Knowing
from calibration.evaluation.image_regression import ImageRegression, Mapped
from calibration.evaluation.images import ScoreMaps
from calibration.evaluation.maps import Images, MapPass
from calibration.evaluation.parts import HEDGED, Resampling
from calibration.evaluation.parts import figures as figures_of
from calibration.evaluation.records import Evaluation, Figure, SetSummary
from calibration.evaluation.regression import CONSTANT
from calibration.evaluation.row_pass import LOGITS, Progress, Spoil, strangeness
from calibration.evaluation.segmentation import Segmentation, Segmented
from calibration.evaluation.sets import HELD
from calibration.metrics.bootstrap import N_BOOT
from calibration.predictor import Predictor
from posthoc.contract import Array, DataError
from posthoc.folds import log_softmax

SCORES = ("ood_score", "epistemic", "epistemic_std")
_FIELDS = {
    "classification": ("label", "probs", "confidence", "set", "ood", "abstain", *SCORES),
    "regression": ("mean", "std", "quantiles", "ood", "abstain", *SCORES),
}
_COMPARED = {
    "classification": ("accuracy", "mean_iou", "nll", "debiased_ece"),
    "regression": ("rmse", "nll", "pce"),
}


class MapRun(NamedTuple):
    """One set of images: its figures, where its images stand, and of each image the share of pixels
    that were flagged or abstained on."""

    figures: Segmentation | ImageRegression
    rows: Array
    dropped: int
    annotated: bool
    held: Mapping[str, Array]


class MapSets:
    """A dense bundle over sets of images, one after another; ``data_range`` as for `evaluate`."""

    def __init__(
        self,
        predictor: Predictor,
        data_range: float | None,
        progress: Progress | None,
        seed: int,
    ):
        self.predictor, self.data_range = predictor, data_range
        self.progress, self.seed = progress, seed
        self.manifest = predictor.manifest
        self.levels = {a: float(predictor.q_hat(a)) for a in self.manifest.alphas}
        self.maps = MapPass(predictor, self.levels)

    def over(
        self,
        data: str | Path,
        what: str,
        *,
        knowing: Knowing | None = None,
        spoil: Spoil | None = None,
    ) -> MapRun:
        """A set of images; ``knowing`` learns them, ``spoil`` spoils them. Raises DataError where
        none is left."""
        figures = self._figures()
        rows: list[Array] = []
        held: dict[str, list[Array]] = {}
        fields = _FIELDS[self.manifest.task]
        for batch in self.maps.over(
            data, what, fields, labelled=True, progress=self.progress, spoil=spoil
        ):
            if knowing is not None:
                knowing.add(batch.inputs, batch.keys)
            if isinstance(figures, Segmentation):
                figures.add(_segmented(self.predictor, batch, self.levels))
            else:
                figures.add(_mapped(self.predictor, batch, self.levels))
            for name, field in HELD.items():
                if field in batch.made:
                    share = batch.made[field].reshape(len(batch), -1).mean(axis=1)
                    held.setdefault(name, []).append(share)
            rows.append(batch.rows)
        dropped = self.maps.dropped
        if not rows:
            raise DataError(
                f"{data}: no image is left ({dropped} were used by the fit, are faulty or "
                "unlabelled)"
            )
        shares = {name: np.concatenate(v) for name, v in held.items()}
        return MapRun(figures, np.concatenate(rows), dropped, self.maps.annotated, shares)

    def _figures(self) -> Segmentation | ImageRegression:
        alphas = tuple(self.levels)
        if self.manifest.task == "classification":
            return Segmentation(self.maps.width, alphas, mask=mask_of(self.manifest))
        quantiles = self.manifest.quantile_levels if "quantiles" in self.predictor.fields else ()
        return ImageRegression(alphas, quantile_levels=quantiles, data_range=self.data_range)

    def result(
        self,
        run: MapRun,
        *,
        strange: Mapping[str, ScoreMaps] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> Evaluation:
        """Every figure of a set."""
        how: dict[str, Any] = {
            "n_conformal": self.manifest.conformal.guarantees[0].n,
            "everything": [a for a, q in self.levels.items() if math.isinf(q)],
            "strange": strange or {},
            "grouped": self.manifest.splits.by is not None,
            "about": about or {},
            "seed": self.seed,
        }
        if isinstance(run.figures, Segmentation):
            return run.figures.result(classes=self.manifest.classes, **how)
        return run.figures.result(**how)

    def summary(
        self, run: MapRun, found: Evaluation, name: str, what: Corrupted | None = None
    ) -> SetSummary:
        """One line of the table of sets; intervals are over images."""
        metrics = next(s for s in found.systems if s.name == HEDGED).metrics
        grouped = self.manifest.splits.by is not None
        groups = np.asarray(run.figures.scores.groups, np.uint64) if grouped else None
        shares = figures_of(run.held, Resampling(groups, N_BOOT, self.seed)) if run.held else {}
        a = found.answered
        return SetSummary(
            name=name,
            n=found.n,
            dropped=run.dropped,
            corruption=None if what is None else what.corruption,
            severity=None if what is None else what.severity,
            metrics={m: metrics[m] for m in _COMPARED[self.manifest.task] if m in metrics},
            levels=found.levels,
            flagged=shares.get("flagged"),
            abstained=shares.get("abstained"),
            answered=None if a is None else Figure(value=a.share),
            answered_error=None if a is None or a.error is None else Figure(value=a.error),
        )


def mask_of(manifest: Manifest) -> int | None:
    """The class whose pixels the sets were promised to hold; None where it is every pixel's."""
    if all(g.kind != "missed" for g in manifest.conformal.guarantees):
        return None
    return int(manifest.conformal.settings["mask"])


def _segmented(predictor: Predictor, batch: Images, levels: Mapping[float, float]) -> Segmented:
    made = batch.made
    assert batch.y is not None
    log_p = log_softmax(made[LOGITS])
    scaled = log_softmax(log_p / predictor.manifest.scaling["temperature_alone"])
    first = next(iter(levels), None)
    return Segmented(
        probs={
            FROZEN: np.exp(log_p).astype(np.float32),
            SCALED: np.exp(scaled).astype(np.float32),
            HEDGED: made["probs"],
        },
        frozen=made[LOGITS].argmax(2),
        label=made["label"],
        confidence=made["confidence"],
        sets={a: made["set" if a == first else f"set@{a}"] for a in levels},
        y=batch.y,
        keys=batch.keys,
        groups=batch.groups,
        scores=strangeness(predictor, batch.made),
        held=_held(made),
        annotations=batch.annotations,
    )


def _mapped(predictor: Predictor, batch: Images, levels: Mapping[float, float]) -> Mapped:
    made = batch.made
    assert batch.y is not None
    noise = np.asarray(predictor.bundle.tensors("state.safetensors")["noise"])
    constant = np.sqrt(noise) * predictor.manifest.scaling["temperature_alone"]
    mean = made["mean"]
    return Mapped(
        mean={CONSTANT: made.get(LOGITS, mean), HEDGED: mean},
        std={CONSTANT: np.broadcast_to(constant, mean.shape), HEDGED: made["std"]},
        half=levels,
        y=batch.y,
        keys=batch.keys,
        groups=batch.groups,
        quantiles=made.get("quantiles"),
        scores=strangeness(predictor, batch.made),
        held=_held(made),
    )


def _held(made: Mapping[str, Array]) -> Array | None:
    """Pixels that were flagged or abstained on; None where there is neither."""
    found = [made[f] for f in ("abstain", "ood") if f in made]
    return np.asarray(np.logical_or.reduce(found)) if found else None


def add_scores(into: ScoreMaps, predictor: Predictor, batch: Images) -> None:
    """Fold the maps that tell strange pixels into ``into``, image by image."""
    scores = strangeness(predictor, batch.made)
    for i in range(len(batch)):
        maps = {name: s[i] for name, s in scores.items()}
        into.add(maps, int(batch.keys[i]), int(batch.groups[i]))
