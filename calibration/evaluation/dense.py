"""Evaluate a dense bundle on a table of images: a pass for the figures, and one for pictures.

The first goes over all images and keeps a few hundred numbers of each; the second runs the three or
four that are shown again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration.evaluation.corrupted import Corrupted, Knowing, Spoiler
from calibration.evaluation.image_regression import ImageRegression
from calibration.evaluation.images import ScoreMaps
from calibration.evaluation.map_sets import SCORES, MapSets, add_scores, mask_of
from calibration.evaluation.maps import Images, MapPass
from calibration.evaluation.pictures import Layer, Scene, choose, draw, photo
from calibration.evaluation.records import Evaluation
from calibration.evaluation.row_pass import Progress
from calibration.evaluation.segmentation import Segmentation, class_name
from calibration.predictor import Predictor
from posthoc.contract import Array, DataError
from posthoc.data import open_table

_SHOWN = {
    "classification": ("label", "entropy", "epistemic", "ood_score", "set", "set_size"),
    "regression": ("mean", "std", "epistemic_std", "ood_score"),
}


def evaluate_maps(
    predictor: Predictor,
    sets: Mapping[str, str | Path],
    *,
    ood_data: Mapping[str, str | Path],
    about: Mapping[str, str],
    spoilt: Sequence[Corrupted] = (),
    progress: Progress | None = None,
    data_range: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Every figure of a dense bundle's report of the first of ``sets``, and pictures where the maps
    have two axes; the other sets, and the first one ``spoilt``, stand beside it.

    ``data_range`` is the range of the target's values, for the signal-to-noise ratio. Raises
    DataError as `evaluate` does.
    """
    manifest = predictor.manifest
    (name, data), *others = sets.items()
    one = MapSets(predictor, data_range, progress, seed)
    maps = one.maps
    knowing = Knowing(open_table(data).n_rows) if spoilt else None
    first = one.over(data, "evaluate", knowing=knowing)
    figures = first.figures
    strange = {}
    for out, path in ood_data.items():
        strange[out] = ScoreMaps(figures.scores.per)
        for batch in maps.over(
            path, out, ("label", "mean", *SCORES), labelled=False, progress=progress
        ):
            add_scores(strange[out], predictor, batch)
        if not strange[out].sizes:
            raise DataError(f"{path}: none of its {maps.dropped} images can be used")
    said = {
        **about,
        "images": f"{figures.n} evaluated, {first.dropped} dropped (fit saw them, faulty or "
        "unlabelled)",
    }
    if first.annotated and isinstance(figures, Segmentation):
        said["annotators"] = (
            f"up to {figures.annotators} an image: GED² is of one sample, the label map, to all of "
            "them without class 0; every other figure holds it against one, drawn by the image's "
            "hash"
        )
    found = one.result(first, strange=strange, about=said)
    if len(sets) + len(spoilt) > 1:
        compared = [one.summary(first, found, name)]
        for other, path in others:
            run = one.over(path, other)
            compared.append(one.summary(run, one.result(run), other))
        known = None if knowing is None else knowing.known()
        learnt = {} if known is None else {what: Spoiler(what, known, seed) for what in spoilt}
        for what, spoil in learnt.items():
            run = one.over(data, what.name, spoil=spoil)
            compared.append(one.summary(run, one.result(run), what.name, what))
        found = found.model_copy(update={"sets": tuple(compared)})
    if len(maps.layout.spatial) != 2 or found.dense is None:
        return found
    scenes = _scenes(maps, data, figures, first.rows, one.levels)
    pictures, swatches = draw(scenes, manifest.classes)
    dense = found.dense.model_copy(update={"pictures": pictures, "swatches": swatches})
    return found.model_copy(update={"dense": dense})


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
