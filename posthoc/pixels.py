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

from posthoc.contract import I64, Array, DataError, Task

if TYPE_CHECKING:
    from posthoc.data import Rows
    from posthoc.graph import Fragment

PER_IMAGE = 256  # pixels drawn from an image


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels are: 1, -1 (last), or None for maps without a channel axis.

    ``axis`` is that of z, ``phi_axis`` of the features, ``out_axis`` of the model's own output and
    so of every field (where it has none, a field's channels come first). ``spatial`` are the sizes
    of the output's other axes, -1 for any. Pixels are numbered in the order of the spatial axes,
    the last one fastest.
    """

    axis: int | None
    out_axis: int | None
    spatial: tuple[int, ...]
    phi_axis: int | None = None

    def shape(self, channels: int) -> tuple[int, ...]:
        """Shape of a row of a field with ``channels`` (0: none) in the layout of the output."""
        if channels == 0 or (self.out_axis is None and channels == 1):
            return self.spatial
        if self.out_axis == -1:
            return (*self.spatial, channels)
        return (channels, *self.spatial)


def pixels(maps: Array, axis: int | None) -> Array:
    """Maps as N×P×C, the channels last."""
    last = maps[..., None] if axis is None else np.moveaxis(maps, axis, -1)
    return np.ascontiguousarray(last).reshape(len(maps), prod(last.shape[1:-1]), last.shape[-1])


def at(maps: Array, axis: int | None, index: I64) -> Array:
    """The pixels ``index`` (N×P) of maps, as N×P×C: `pixels`, without a copy of the whole."""
    n, count = len(maps), prod(_sizes(maps, axis))
    image = np.arange(n)[:, None]
    if axis is None:
        return maps.reshape(n, count)[image, index][:, :, None]
    if axis == 1:
        return maps.reshape(n, maps.shape[1], count)[image, :, index]
    return maps.reshape(n, count, maps.shape[-1])[image, index]


def sizes(maps: Array, axis: int | None, layout: Layout) -> tuple[int, ...]:
    """Spatial sizes of the output's maps, from those of z: see `emit_sizes`."""
    found = _sizes(maps, axis)
    return (prod(found),) if len(layout.spatial) == 1 else found


def _sizes(maps: Array, axis: int | None) -> tuple[int, ...]:
    return maps.shape[2:] if axis == 1 else maps.shape[1:-1] if axis == -1 else maps.shape[1:]


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
    axes = {"z": layout.axis, "phi": layout.phi_axis}
    found = sizes(values["z"], layout.axis, layout)
    n, count = len(values["z"]), prod(found)
    width = 1 if layout.axis is None else values["z"].shape[layout.axis]
    labels = None
    if rows.y is not None and len(rows.bad) == n:  # nothing says what size their maps have
        labels = np.zeros(
            (n, count) if task == "classification" else (n, count, width), rows.y.dtype
        )
    elif rows.y is not None:
        check_target(rows.y, layout, task, found)
        labels = target_pixels(rows.y, layout, task, count)
    labelled: NDArray[np.bool_] = np.ones((n, count), bool)
    if labels is not None:
        known = labels >= 0 if task == "classification" else np.isfinite(labels).all(2)
        labelled = np.asarray(known, bool)
    bad = dict(rows.bad)
    for name, value in values.items():
        for row in np.flatnonzero(~np.isfinite(value.reshape(n, -1)).all(1)):
            bad.setdefault(int(row), f"the model's {name} for it is NaN or Inf")
    for row in np.flatnonzero(~labelled.any(1)):
        bad.setdefault(int(row), "has no labelled pixel")
    labelled[list(bad)] = True  # any will do
    index = draw(rows.content_hashes, labelled, per)
    taken = {k: at(v, axes[k], index).reshape(n * per, -1) for k, v in values.items()}
    y = None
    if labels is not None:
        chosen = labels[np.arange(n)[:, None], index]
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


def drawn_annotator(annotations: Array, keys: Array) -> Array:
    """Of N×A×P maps of classes (-1: no label) one for each image, N×P: of the annotators who
    labelled any of it, the one at the content hash modulo their number."""
    some: Array = np.asarray((annotations >= 0).any(2))
    some[~some.any(1)] = True
    places = [np.flatnonzero(s) for s in some]
    index = [p[int(k) % len(p)] for p, k in zip(places, keys.tolist(), strict=True)]
    return np.asarray(annotations[np.arange(len(annotations)), index])


def taken(field: Array, layout: Layout, axes: str, index: Array) -> Array:
    """The pixels ``index`` (N×P) of a field, as rows (N·P)×its axes after the batch ("", "C", "K",
    "KQ"): what `emit_maps` made maps of."""
    if len(axes) == 2:
        last = field.shape[-1]
        moved = [taken(field[..., i], layout, axes[:1], index) for i in range(last)]
        return np.stack(moved, -1)
    if not axes:
        return np.asarray(at(field, None, index).ravel())
    none = layout.out_axis is None and field.ndim == 1 + len(layout.spatial)
    axis = None if none else -1 if layout.out_axis == -1 else 1
    rows = at(field, axis, index)
    return np.asarray(rows.reshape(-1, rows.shape[2]))


def target_pixels(y: Array, layout: Layout, task: Task, count: int) -> Array:
    """Target maps of ``count`` pixels as N×P class indices, or N×P×K values; DataError for another
    number."""
    axis = _target_axis(y, layout, task)
    found = y.reshape(len(y), -1) if task == "classification" else pixels(y, axis)
    if found.shape[1] != count:
        raise DataError(
            f"the target's maps have {found.shape[1]:,} pixels ({_text(y.shape[1:])}) and the "
            f"model's outputs {count:,} ({_text(layout.spatial)})"
        )
    return found


def check_target(y: Array, layout: Layout, task: Task, sizes: tuple[int, ...]) -> None:
    """DataError unless the spatial sizes of target maps are ``sizes``, those of the outputs."""
    found = _sizes(y, _target_axis(y, layout, task))
    if found != sizes:
        raise DataError(
            f"the target's maps are {_text(found)} and the model's outputs {_text(sizes)}; give "
            "targets of the outputs' size"
        )


def _target_axis(y: Array, layout: Layout, task: Task) -> int | None:
    channels = task == "regression" and y.ndim > len(layout.spatial) + 1
    return layout.out_axis if channels else None


def target_shape(layout: Layout, task: Task, width: int) -> tuple[int, ...]:
    """Shape of a row of the target column: the class maps, or values like the outputs."""
    return layout.spatial if task == "classification" else layout.shape(width)


def _text(shape: tuple[int, ...]) -> str:
    return "×".join("any" if d == -1 else str(d) for d in shape)


def emit_rows(g: Fragment, tensor: str, axis: int | None) -> str:
    """Maps of any number of spatial axes as rows (N·P)×C."""
    if axis is None:
        return g.op("Reshape", tensor, g.const([-1, 1], "int64"))
    shape = g.op("Shape", tensor)
    if axis == 1:
        count = _emit_product(g, _emit_slice(g, shape, 2, _END))
        flat = g.op("Concat", _emit_slice(g, shape, 0, 2), count, axis=0)
        tensor = g.op("Transpose", g.op("Reshape", tensor, flat), perm=[0, 2, 1])
        channels = _emit_slice(g, shape, 1, 2)
    else:
        channels = _emit_slice(g, shape, -1, _END)
    return g.op("Reshape", tensor, g.op("Concat", g.const([-1], "int64"), channels, axis=0))


def emit_sizes(g: Fragment, tensor: str, axis: int | None, spatial: int) -> str:
    """Batch and spatial sizes of the output's maps, as an int64 tensor, from those of z in one
    layout. z has ``spatial`` axes; where the output has a single one they are flattened."""
    shape = g.op("Shape", tensor)
    batch = _emit_slice(g, shape, 0, 1)
    rest = _emit_slice(g, shape, 2 if axis == 1 else 1, -1 if axis == -1 else _END)
    return g.op("Concat", batch, _emit_product(g, rest) if spatial == 1 else rest, axis=0)


_END = 2**31  # of a slice: past any axis


def _emit_slice(g: Fragment, shape: str, start: int, end: int) -> str:
    return g.op("Slice", shape, g.const([start], "int64"), g.const([end], "int64"))


def _emit_product(g: Fragment, sizes: str) -> str:
    """The product of an int64 vector, as a vector of one."""
    return g.op("ReduceProd", sizes, keepdims=1)


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
