"""Evaluate a dense bundle on a table of images: a pass for the figures, and one for pictures.

The first goes over all images and keeps a few hundred numbers of each; the second runs the three or
four that are shown again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.bundle import Manifest
from calibration.evaluation.classification import FROZEN, SCALED
from calibration.evaluation.image_regression import ImageRegression, Mapped
from calibration.evaluation.images import ScoreMaps
from calibration.evaluation.maps import LOGITS, Images, MapPass, Progress
from calibration.evaluation.parts import HEDGED
from calibration.evaluation.pictures import Layer, Scene, choose, draw, photo
from calibration.evaluation.records import Evaluation
from calibration.evaluation.regression import CONSTANT
from calibration.evaluation.segmentation import Segmentation, Segmented, class_name
from calibration.predictor import Predictor
from posthoc.contract import Array, DataError
from posthoc.folds import log_softmax

_SCORES = ("ood_score", "epistemic", "epistemic_std")
_FIELDS = {
    "classification": ("label", "probs", "confidence", "set", "ood", "abstain", *_SCORES),
    "regression": ("mean", "std", "quantiles", "ood", "abstain", *_SCORES),
}
_SHOWN = {
    "classification": ("label", "entropy", "epistemic", "ood_score", "set", "set_size"),
    "regression": ("mean", "std", "epistemic_std", "ood_score"),
}


def evaluate_maps(
    predictor: Predictor,
    data: str | Path,
    *,
    ood_data: Mapping[str, str | Path],
    about: Mapping[str, str],
    progress: Progress | None = None,
    data_range: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Every figure of a dense bundle's report, and pictures where the maps have two axes.

    ``data_range`` is the range of the target's values, for the signal-to-noise ratio. Raises
    DataError as `evaluate` does.
    """
    manifest = predictor.manifest
    levels = {a: float(predictor.q_hat(a)) for a in manifest.alphas}
    maps = MapPass(predictor, levels)
    figures: Segmentation | ImageRegression
    if manifest.task == "classification":
        figures = Segmentation(maps.width, tuple(levels), mask=mask_of(manifest))
    else:
        quantiles = manifest.quantile_levels if "quantiles" in predictor.fields else ()
        figures = ImageRegression(tuple(levels), quantile_levels=quantiles, data_range=data_range)
    rows: list[Array] = []
    fields = _FIELDS[manifest.task]
    for batch in maps.over(data, "evaluate", fields, labelled=True, progress=progress):
        if isinstance(figures, Segmentation):
            figures.add(_segmented(predictor, batch, levels))
        else:
            figures.add(_mapped(predictor, batch, levels))
        rows.append(batch.rows)
    dropped, annotated = maps.dropped, maps.annotated
    if not rows:
        raise DataError(
            f"{data}: no image is left ({dropped} were used by the fit, are faulty or unlabelled)"
        )
    strange = {}
    for name, path in ood_data.items():
        strange[name] = ScoreMaps(figures.scores.per)
        for batch in maps.over(
            path, name, ("label", "mean", *_SCORES), labelled=False, progress=progress
        ):
            _add_scores(strange[name], predictor, batch)
        if not strange[name].sizes:
            raise DataError(f"{path}: none of its {maps.dropped} images can be used")
    said = {
        **about,
        "images": f"{figures.n} evaluated, {dropped} dropped (fit saw them, faulty or unlabelled)",
    }
    if annotated and isinstance(figures, Segmentation):
        said["annotators"] = (
            f"up to {figures.annotators} an image: GED² is of one sample, the label map, to all of "
            "them without class 0; every other figure holds it against one, drawn by the image's "
            "hash"
        )
    how: dict[str, Any] = {
        "n_conformal": manifest.conformal.guarantees[0].n,
        "everything": [a for a, q in levels.items() if math.isinf(q)],
        "strange": strange,
        "grouped": manifest.splits.by is not None,
        "about": said,
        "seed": seed,
    }
    if isinstance(figures, Segmentation):
        found = figures.result(classes=manifest.classes, **how)
    else:
        found = figures.result(**how)
    if len(maps.layout.spatial) != 2 or found.dense is None:
        return found
    scenes = _scenes(maps, data, figures, np.concatenate(rows), levels)
    pictures, swatches = draw(scenes, manifest.classes)
    dense = found.dense.model_copy(update={"pictures": pictures, "swatches": swatches})
    return found.model_copy(update={"dense": dense})


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
        scores=_scores(predictor, batch),
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
        scores=_scores(predictor, batch),
        held=_held(made),
    )


def _held(made: Mapping[str, Array]) -> Array | None:
    """Pixels that were flagged or abstained on; None where there is neither."""
    found = [made[f] for f in ("abstain", "ood") if f in made]
    return np.asarray(np.logical_or.reduce(found)) if found else None


def _scores(predictor: Predictor, batch: Images) -> dict[str, Array]:
    """Maps that tell strange pixels: ours, and maximum softmax of the frozen model."""
    made = batch.made
    out: dict[str, Array] = {}
    if "ood_score" in made:
        out["hedged"] = made["ood_score"]
    if predictor.manifest.task == "classification":
        out["msp"] = -np.exp(log_softmax(made[LOGITS])).max(2)
    if "epistemic" in made:
        out["epistemic"] = made["epistemic"]
    elif "epistemic_std" in made:
        out["epistemic"] = made["epistemic_std"].max(2)
    return out


def _add_scores(into: ScoreMaps, predictor: Predictor, batch: Images) -> None:
    scores = _scores(predictor, batch)
    for i in range(len(batch)):
        maps = {name: s[i] for name, s in scores.items()}
        into.add(maps, int(batch.keys[i]), int(batch.groups[i]))


def _scenes(
    maps: MapPass,
    data: str | Path,
    figures: Segmentation | ImageRegression,
    rows: Array,
    levels: Mapping[float, float],
) -> list[Scene]:
    """The chosen images, run once more, with their maps."""
    manifest = maps.predictor.manifest
    first = next(iter(levels), None)
    uncovered = None if first is None else figures.uncovered(first)
    if uncovered is not None and np.isnan(uncovered).all():
        uncovered = None  # no image shows the mask's class
    scenes = []
    for title, at in choose(figures.error, uncovered).items():
        row = int(rows[at])
        shown = maps.over(
            data, "", _SHOWN[manifest.task], labelled=True, progress=None, start=row, count=1
        )
        image = next(shown)
        error = float(figures.error[at])
        if manifest.task == "classification":
            note = f"{100 * error:.2f} % of its pixels wrong"
            layers = _class_layers(image, first, mask_of(manifest), manifest.classes)
        else:
            note = f"root mean squared error {math.sqrt(error):.4g}"
            layers = _value_layers(image, first, levels)
        if uncovered is not None and first is not None and not math.isnan(uncovered[at]):
            what = "uncovered" if mask_of(manifest) is None else "of the class missed"
            note += f", {100 * uncovered[at]:.2f} % {what} at level {_percent(first)}"
        scenes.append(Scene(title, f"Row {row}: {note}", row, tuple(layers)))
    return scenes


def _class_layers(
    image: Images, alpha: float | None, mask: int | None, classes: Sequence[str] | None
) -> list[Layer]:
    assert image.y is not None
    made = {name: value[0] for name, value in image.made.items()}
    truth, label = image.y[0], made["label"]
    wrong = np.where(truth >= 0, (label != truth).astype(np.float64), np.nan)
    flat = [
        Layer("Prediction", "classes", label),
        Layer("Truth", "classes", truth),
        Layer("Wrong pixels", "heat", wrong),
        Layer("Entropy (nats)", "heat", made["entropy"]),
    ]
    if "epistemic" in made:
        flat.append(Layer("Epistemic part (nats)", "heat", made["epistemic"]))
    if "ood_score" in made:
        flat.append(Layer("Strangeness (OOD score)", "heat", made["ood_score"]))
    if alpha is not None and mask is not None:
        title = f"Mask of {class_name(classes, mask)} at level {_percent(alpha)}"
        flat.append(Layer(title, "heat", made["set"][:, mask].astype(np.float64)))
    elif alpha is not None:
        flat.append(Layer(f"Set size at level {_percent(alpha)}", "heat", made["set_size"]))
    return [*_input(image), *_shaped(flat, image.spatial)]


def _value_layers(image: Images, alpha: float | None, levels: Mapping[float, float]) -> list[Layer]:
    assert image.y is not None
    made = {name: value[0] for name, value in image.made.items()}
    mean, truth, std = made["mean"], image.y[0], made["std"]
    flat = [
        Layer("Prediction", "values", _colours(mean)),
        Layer("Truth", "values", _colours(truth)),
        Layer("Absolute error", "heat", np.abs(truth - mean).mean(1)),
        Layer("Standard deviation", "heat", _joint(std)),
    ]
    if "epistemic_std" in made:
        flat.append(Layer("Epistemic deviation", "heat", _joint(made["epistemic_std"])))
    if "ood_score" in made:
        flat.append(Layer("Strangeness (OOD score)", "heat", made["ood_score"]))
    if alpha is not None and math.isfinite(levels[alpha]):
        width = 2 * levels[alpha] * std.mean(1)
        flat.append(Layer(f"Interval width at level {_percent(alpha)}", "heat", width))
    return [*_input(image), *_shaped(flat, image.spatial)]


def _input(image: Images) -> Iterable[Layer]:
    shown = photo({name: value[0] for name, value in image.inputs.items()})
    return [] if shown is None else [Layer("Input", "photo", shown)]


def _shaped(layers: Sequence[Layer], spatial: tuple[int, ...]) -> list[Layer]:
    return [Layer(m.title, m.kind, m.pixels.reshape(*spatial, *m.pixels.shape[1:])) for m in layers]


def _percent(alpha: float) -> str:
    return f"{round(100 * (1 - alpha), 8):g} %"


def _colours(values: Array) -> Array:
    """Pixels P×K as they can be shown: three outputs as colours, else the first of them."""
    return values if values.shape[1] == 3 else values[:, 0]


def _joint(std: Array) -> Array:
    """One standard deviation a pixel, P, of P×K: the root mean square."""
    return np.asarray(np.sqrt((np.asarray(std, np.float64) ** 2).mean(1)))
