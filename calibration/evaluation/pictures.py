"""Pictures of a few test images: input, prediction, truth and the maps that say how sure it is.

Maps of one kind share one scale over all pictures, so that a hard image shows beside an easy one.
Large maps are thinned to at most 224 pixels a side: values averaged, classes picked.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from calibration.evaluation import png
from calibration.evaluation.records import Picture, PictureMap
from calibration.evaluation.segmentation import class_name
from posthoc.contract import F64, Array

SIDE = 224
Kind = Literal["photo", "values", "classes", "heat"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One map of one image: H×W (classes: int, -1 for none; heat: NaN for none), or H×W×3.

    A ``photo`` is stretched over its own range, ``values`` over the range of all values.
    """

    title: str
    kind: Kind
    pixels: Array


@dataclass(frozen=True, slots=True)
class Scene:
    """A chosen image and its layers."""

    title: str
    note: str
    row: int
    layers: tuple[Layer, ...]


def choose(error: Array, uncovered: Array | None = None) -> dict[str, int]:
    """Which of N images to show, by title: the hardest, the one of median error, the easiest, and
    the one with most uncovered pixels. An image that would show twice is shown once."""
    order = np.argsort(-np.asarray(error), kind="stable")
    wanted = {
        "Hardest": order[0],
        "Median": order[len(order) // 2],
        "Easiest": order[-1],
        **(
            {}
            if uncovered is None
            else {"Least covered": int(np.argmax(np.nan_to_num(uncovered, nan=-1)))}
        ),
    }
    found: dict[str, int] = {}
    for title, at in wanted.items():
        if int(at) not in found.values():
            found[title] = int(at)
    return found


def photo(inputs: Mapping[str, Array]) -> Array | None:
    """The first input of one image (no batch axis) that looks like a picture, as H×W or H×W×3: one
    or three channels, first or last. None where none does."""
    for x in inputs.values():
        if x.ndim == 2 and min(x.shape) > 3:
            return x
        if x.ndim == 3 and x.shape[0] in (1, 3) and min(x.shape[1:]) > 3:
            return x[0] if x.shape[0] == 1 else np.moveaxis(x, 0, -1)
        if x.ndim == 3 and x.shape[2] in (1, 3) and min(x.shape[:2]) > 3:
            return x[..., 0] if x.shape[2] == 1 else x
    return None


def draw(
    scenes: Sequence[Scene], classes: Sequence[str] | None
) -> tuple[tuple[Picture, ...], tuple[tuple[str, str], ...]]:
    """The pictures, and name and colour of the classes that occur in them."""
    layers = [layer for s in scenes for layer in s.layers]
    scales: dict[str, tuple[float, float]] = {}
    for layer in layers:
        if layer.kind == "heat" and layer.title not in scales:
            scales[layer.title] = _range([m.pixels for m in layers if m.title == layer.title])
    values = _range([m.pixels for m in layers if m.kind == "values"])
    seen = sorted({int(c) for m in layers if m.kind == "classes" for c in np.unique(m.pixels)})
    named = partial(class_name, classes)
    palette = png.class_palette()
    swatches = tuple((named(c), png.hex_colour(palette[c % png.BLANK])) for c in seen if c >= 0)
    pictures = tuple(
        Picture(
            title=f"{s.title} test image",
            note=s.note,
            row=s.row,
            maps=tuple(_map(m, s.title, scales, values, named) for m in s.layers),
        )
        for s in scenes
    )
    return pictures, swatches


def _map(
    layer: Layer,
    whose: str,
    scales: Mapping[str, tuple[float, float]],
    values: tuple[float, float],
    named: Callable[[int], str],
) -> PictureMap:
    title, x = layer.title, layer.pixels
    if layer.kind == "classes":
        index = np.where(x < 0, png.BLANK, x % png.BLANK).astype(np.uint8)
        data = png.encode(_thinned(index), png.class_palette())
        found, counts = np.unique(x[x >= 0], return_counts=True)
        most = np.argsort(-counts, kind="stable")[:3]
        said = ", ".join(f"{100 * counts[i] / x.size:.0f} % {named(int(found[i]))}" for i in most)
        if len(found) > 3:
            said += f" and {len(found) - 3} more"
    elif layer.kind == "heat":
        low, high = scales[title]
        data = png.encode(_levels(_averaged(x), low, high), png.heat_palette())
        said = f"from {_text(np.nanmin(x))} to {_text(np.nanmax(x))}, mean {_text(np.nanmean(x))}"
        title = f"{title}, {_text(low)} to {_text(high)}"
    else:
        own = _range([x]) if layer.kind == "photo" else values
        shown = _levels(_averaged(x), *own)
        shown = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)
        data = png.encode(shown)
        said = f"values from {_text(np.nanmin(x))} to {_text(np.nanmax(x))}"
    alt = f"{layer.title} of the {whose.lower()} test image: {said}"
    return PictureMap(title=title, alt=alt, png=base64.b64encode(data).decode())


def _text(value: Any) -> str:
    return f"{float(value):.3g}".replace("-", "−")


def _range(maps: Sequence[Array]) -> tuple[float, float]:
    """Ends that hold all but the outermost half per cent; a floor of 0 for what starts near it."""
    if not maps:
        return 0.0, 1.0
    flat = np.concatenate([np.asarray(m, np.float64).ravel() for m in maps])
    flat = flat[np.isfinite(flat)]
    if not len(flat):
        return 0.0, 1.0
    low, high = (float(q) for q in np.quantile(flat, [0.005, 0.995]))
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if not low < high:
        # Of nearly equal values a few may differ: they are what there is to see.
        low, high = min(low, float(flat.min())), max(high, float(flat.max()))
    return (low, high) if low < high else (low, low + 1.0)


def _levels(x: F64, low: float, high: float) -> Array:
    """0…254 over the range, 255 where there is no value."""
    scaled = np.clip((x - low) / (high - low), 0, 1) * (png.BLANK - 1)
    return np.where(np.isfinite(x), np.round(np.nan_to_num(scaled)), png.BLANK).astype(np.uint8)


def _step(shape: Sequence[int]) -> int:
    return max(1, math.ceil(max(shape[:2]) / SIDE))


def _thinned(x: Array) -> Array:
    step = _step(x.shape)
    return np.ascontiguousarray(x[step // 2 :: step, step // 2 :: step])


def _averaged(x: Array) -> F64:
    """Means over blocks, without the pixels that hold no value; the last blocks may be smaller."""
    step, a = _step(x.shape), np.asarray(x, np.float64)
    if step == 1:
        return a
    held = np.isfinite(a)
    sums, counts = np.where(held, a, 0.0), held.astype(np.float64)
    for axis in (0, 1):
        starts = np.arange(0, x.shape[axis], step)
        sums, counts = (np.add.reduceat(v, starts, axis=axis) for v in (sums, counts))
    means: F64 = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means
