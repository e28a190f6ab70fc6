"""Dense outputs: every pixel of a map is a row, and its image is the item.

A dense model gives N×C×H×W, N×H×W×C, N×T×C or N×H×W. Modules, scores and calibration see pixels as
rows N×C and need not know; guarantees count images, because pixels of one image are no independent
evidence. Of each image a fixed number of pixels is drawn uniformly, so that a mean over them is
unbiased for the mean over the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from posthoc.contract import Array, DataError, Task

if TYPE_CHECKING:
    from posthoc.data import Rows
    from posthoc.graph import Fragment

PER_IMAGE = 256  # pixels drawn from an image


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels are: 1, -1 (last), or None for maps without a channel axis.

    ``axis`` is that of z, ``phi_axis`` of the features, ``out_axis`` of the model's own output and
    so of every field. ``spatial`` are the sizes of the output's other axes, -1 for any. Pixels are
    numbered in the order of the spatial axes, the last one fastest.
    """

    axis: int | None
    out_axis: int | None
    spatial: tuple[int, ...]
    phi_axis: int | None = None

    def shape(self, channels: int, *, keep: bool = True) -> tuple[int, ...]:
        """Shape of a row of a field with ``channels`` (0: none) in the layout of the output."""
        if channels == 0 or (self.out_axis is None and channels == 1):
            return self.spatial
        if self.out_axis == -1:
            return (*self.spatial, channels)
        return (channels, *self.spatial)

    def fields(self, pixels: Array, spatial: tuple[int, ...]) -> Array:
        """Pixels N×P or N×P×C as a map in the layout of the output."""
        if pixels.ndim == 2:
            return pixels.reshape(len(pixels), *spatial)
        maps = pixels.reshape(len(pixels), *spatial, pixels.shape[2])
        if self.out_axis == -1:
            return maps
        if self.out_axis is None and pixels.shape[2] == 1:
            return np.asarray(maps[..., 0])
        return np.moveaxis(maps, -1, 1)


def pixels(maps: Array, axis: int | None) -> Array:
    """Maps as N×P×C, the channels last."""
    if axis is None:
        return maps.reshape(len(maps), -1, 1)
    last = np.moveaxis(maps, axis, -1)
    return np.ascontiguousarray(last).reshape(len(maps), -1, last.shape[-1])


def draw(keys: NDArray[np.uint64], labelled: NDArray[np.bool_], per: int) -> NDArray[np.int64]:
    """``per`` pixels of each image: N×per indices among those ``labelled`` (N×P), which are one or
    more in every image. The draw depends on the image's key alone.

    Where an image has fewer, all of them are taken as often as it takes, in random order: the
    mean over the draw stays unbiased.
    """
    found = np.empty((len(keys), per), np.int64)
    for i, key in enumerate(keys.tolist()):
        index = np.flatnonzero(labelled[i])
        rng = np.random.default_rng(key)
        if len(index) >= per:
            found[i] = rng.choice(index, per, replace=False)
        else:
            rounds = -(-per // len(index))
            found[i] = np.concatenate([rng.permutation(index) for _ in range(rounds)])[:per]
    return found


def sampled(
    rows: Rows, values: Mapping[str, Array], layout: Layout, task: Task, per: int
) -> tuple[Rows, dict[str, Array], NDArray[np.int64]]:
    """Rows of images and their maps → rows of ``per`` drawn pixels each, values (N·per)×C, and the
    number of each pixel in its image.

    A label below 0 (classification) or NaN (regression) says that a pixel has none. Images with a
    NaN in a map, or without any label, become bad. Raises DataError for targets whose maps are of
    another size than the outputs.
    """
    maps = {
        name: pixels(value, layout.phi_axis if name == "phi" else layout.axis)
        for name, value in values.items()
    }
    n, count = maps["z"].shape[:2]
    labels = None if rows.y is None else target_pixels(rows.y, layout, task, count)
    labelled: NDArray[np.bool_] = np.ones((n, count), bool)
    if labels is not None:
        known = labels >= 0 if task == "classification" else np.isfinite(labels).all(2)
        labelled = np.asarray(known, bool)
    bad = dict(rows.bad)
    for name, value in maps.items():
        for row in np.flatnonzero(~np.isfinite(value).all(axis=(1, 2))):
            bad.setdefault(int(row), f"the model's {name} for it is NaN or Inf")
    for row in np.flatnonzero(~labelled.any(1)):
        bad.setdefault(int(row), "has no labelled pixel")
    labelled[list(bad)] = True  # any will do
    index = draw(rows.content_hashes, labelled, per)
    at = np.arange(n)[:, None]
    taken = {name: value[at, index].reshape(n * per, -1) for name, value in maps.items()}
    y = None
    if labels is not None:
        chosen = labels[at, index]
        chosen[list(bad)] = 0
        y = chosen.reshape(n * per, *chosen.shape[2:])
    repeated = dataclasses.replace(
        rows,
        inputs={},
        y=y,
        bad={i * per + j: why for i, why in bad.items() for j in range(per)},
        ids=None if rows.ids is None else [i for i in rows.ids for _ in range(per)],
        groups=None if rows.groups is None else rows.groups.repeat(per),
        split_keys=rows.split_keys.repeat(per),
        content_hashes=rows.content_hashes.repeat(per),
    )
    return repeated, taken, index.ravel()


def taken(field: Array, layout: Layout, axes: str, index: Array) -> Array:
    """The pixels ``index`` (N×P) of a field, as rows (N·P)×its axes after the batch ("", "C", "K",
    "KQ"): what `Layout.fields` and the graph made maps of."""
    n = len(field)
    if len(axes) == 2:
        last = field.shape[-1]
        moved = [taken(field[..., i], layout, axes[:1], index) for i in range(last)]
        return np.stack(moved, -1)
    if not axes:
        return np.asarray(field.reshape(n, -1)[np.arange(n)[:, None], index].ravel())
    spatial = len(layout.spatial)
    none = layout.out_axis is None and field.ndim == 1 + spatial
    axis = None if none else -1 if layout.out_axis == -1 else 1
    rows = pixels(field, axis)
    return np.asarray(rows[np.arange(n)[:, None], index].reshape(-1, rows.shape[2]))


def target_pixels(y: Array, layout: Layout, task: Task, count: int) -> Array:
    """Target maps as N×P class indices, or N×P×K values; DataError for another size."""
    if task == "classification":
        found = y.reshape(len(y), -1)
    else:
        axis = layout.out_axis if y.ndim > len(layout.spatial) + 1 else None
        found = pixels(y, axis)
    if found.shape[1] != count:
        raise DataError(
            f"the target's maps have {found.shape[1]:,} pixels ({_text(y.shape[1:])}) and the "
            f"model's outputs {count:,} ({_text(layout.spatial)})"
        )
    return found


def target_shape(layout: Layout, task: Task, width: int) -> tuple[int, ...]:
    """Shape of a row of the target column: the class maps, or values like the outputs."""
    return layout.spatial if task == "classification" else layout.shape(width)


def _text(shape: tuple[int, ...]) -> str:
    return "×".join("any" if d == -1 else str(d) for d in shape)


def emit_rows(g: Fragment, tensor: str, axis: int | None, spatial: int) -> str:
    """Maps of ``spatial`` axes beside the batch as rows (N·P)×C."""
    if axis is None:
        return g.op("Reshape", tensor, g.const([-1, 1], "int64"))
    if axis == 1:
        order = [0, *range(2, 2 + spatial), 1]
        tensor = g.op("Transpose", tensor, perm=order)
    channels = g.op("Slice", g.op("Shape", tensor), g.const([-1], "int64"), g.const([9], "int64"))
    shape = g.op("Concat", g.const([-1], "int64"), channels, axis=0)
    return g.op("Reshape", tensor, shape)


def emit_sizes(g: Fragment, tensor: str, axis: int | None) -> str:
    """Batch and spatial sizes of maps in one layout, as an int64 tensor."""
    shape = g.op("Shape", tensor)
    if axis is None:
        return shape
    one, end, first = g.const([1], "int64"), g.const([9], "int64"), g.const([0], "int64")
    if axis == -1:
        return g.op("Slice", shape, first, g.const([-1], "int64"))
    batch = g.op("Slice", shape, first, one)
    return g.op("Concat", batch, g.op("Slice", shape, g.const([2], "int64"), end), axis=0)


def emit_maps(g: Fragment, rows: str, sizes: str, layout: Layout, tail: tuple[int, ...]) -> str:
    """Rows (N·P)×tail as maps in the layout of the output: channels (the first of ``tail``) where
    it has them, whatever follows them last."""
    spatial = len(layout.spatial)
    if layout.out_axis is None and tail[:1] == (1,):
        tail = tail[1:]
        channels = 0
    else:
        channels = len(tail[:1])
    shape = sizes if not tail else g.op("Concat", sizes, g.const(tail, "int64"), axis=0)
    maps = g.op("Reshape", rows, shape)
    if not channels or layout.out_axis == -1:
        return maps
    after = range(2 + spatial, 1 + spatial + len(tail))
    return g.op("Transpose", maps, perm=[0, 1 + spatial, *range(1, 1 + spatial), *after])


def emit_per_row(g: Fragment, values: str, sizes: str, spatial: int) -> str:
    """A tensor [R] of the images (R = N, or 1 for all of them) as [N·P]."""
    shaped = g.op("Reshape", values, g.const([-1, *[1] * spatial], "int64"))
    return g.op("Reshape", g.op("Expand", shaped, sizes), g.const([-1], "int64"))


def size(spatial: tuple[int, ...]) -> int:
    """Pixels of an image; 0 where its size is free."""
    return 0 if -1 in spatial else prod(spatial)
