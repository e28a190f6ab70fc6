"""Finds z, its head and where the channels are, in a model whose output is a map.

The counterpart of `posthoc.model.agreement` for N×C×H×W, N×H×W×C, N×T×C and N×H×W: what the walks
suggest is believed where every pixel of it agrees with the model's own output on the probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc.contract import I64, Array, ModelError, Task
from posthoc.model.agreement import apply_steps, are_probabilities, mismatch_of
from posthoc.model.heads import Walk
from posthoc.model.linear import Found
from posthoc.model.probe import Probe
from posthoc.pixels import Layout, at

Axis = int | None
_PIXELS = 4096  # of an image that are looked at


@dataclass(frozen=True, slots=True)
class DenseOutput:
    """The walk that was believed, z and its layout; ``found`` and its φ where there is a linear
    layer for each pixel (a 1×1 convolution, or a matrix on the last axis), else ``stop``."""

    way: Walk
    z: str
    layout: Layout
    found: Found | None
    stop: str
    probabilities: bool


def is_dense(value: Array, spec: Sequence[int]) -> bool:
    """Whether an output is a map: two axes or more of more than one beside the batch, or three
    or more of which some are free (channels never are)."""
    if value.ndim < 3:
        return False
    free = any(d == -1 for d in spec[1:])
    return free or sum(d > 1 for d in value.shape[1:]) >= 2


def dense_output(
    walks: Sequence[Walk],
    values: Probe,
    name: str,
    spec: Sequence[int],
    task: Task,
    head: str | None,
    inputs: Sequence[str] = (),
) -> DenseOutput:
    """z, its layout and its head, for the output ``name`` whose shape in the graph is ``spec``.

    A head, or a softmax or argmax, tells where the channels are. Else they are where the values
    sum to one, where the graph has a fixed size among free ones, or where the other sizes are
    those of an image among the ``inputs``; and failing that in axis 1 of four, the last of three.

    Raises ModelError for an output that is no map of floats (or, where z is found, of classes), and
    where ``head`` is no linear layer of it.
    """
    whole = values[name]
    sigmoid = any("sigmoid" in way.steps for way in walks)
    likely = _readings(values, name, spec, task, inputs, sigmoid)
    boxes: list[tuple[Walk, str, Layout, str]] = []
    for way in walks:
        for z, axis, out in _candidates(way, values, whole, likely):
            seen = _places(whole, out)
            if not apply_steps(way.steps, _rows(values[z], axis, seen), _rows(whole, out, seen)):
                continue
            layout = Layout(axis, out, _spatial(spec, out, whole.ndim))
            found, phi_axis, stop = _head(way, values, z, axis)
            if found is not None:
                return DenseOutput(way, z, replace(layout, phi_axis=phi_axis), found, "", False)
            boxes.append((way, z, layout, stop))
    if head is not None:
        raise ModelError(f"output {name!r} is not what {head!r} gives, pixel by pixel")
    if not boxes and whole.dtype.kind != "f":
        raise ModelError(
            f"output {name!r} holds {whole.dtype} maps of shape {whole.shape[1:]} and what they "
            "were made from was not found; name an output of floats with --output"
        )
    if not boxes:
        way = Walk((), (), (), None, "the operators before the output are not what they seem")
        layout = Layout(likely[0], likely[0], _spatial(spec, likely[0], whole.ndim))
        boxes.append((way, name, layout, way.stop))
    way, z, layout, stop = boxes[0]
    given = task == "classification" and not way.steps
    probs = given and _sum_to_one(values[z], layout.axis)
    return DenseOutput(way, z, layout, None, stop, probs)


def _candidates(
    way: Walk, values: Probe, output: Array, likely: Sequence[Axis]
) -> Iterator[tuple[str, Axis, Axis]]:
    """(z, its channel axis, the output's), the likeliest reading of the output first.

    z has as many spatial axes as the output, or the output has a single one, into which those of z
    were flattened: a field's map is laid out by the sizes of z.
    """
    labels = "argmax" in way.steps
    for out in likely:
        width, count = _channels(output, out), _count(output, out)
        for name in reversed(way.path) if width == 1 or not labels else ():
            value = values[name]
            if value.dtype.kind != "f" or value.ndim < 3 or len(value) != len(output):
                continue
            for axis in dict.fromkeys([out, 1, -1]):
                like = _spatial_axes(output, out) in (1, _spatial_axes(value, axis))
                wide = _channels(value, axis)
                if like and _count(value, axis) == count and (labels or wide == width):
                    yield name, axis, out


def _readings(
    values: Probe, name: str, spec: Sequence[int], task: Task, inputs: Sequence[str], sigmoid: bool
) -> list[Axis]:
    """Where the channels of the output may be, the likeliest first; None: it has no such axis."""
    value = values[name]
    shape = value.shape[1:]
    free = [d == -1 for d in spec[1:]] if len(spec) == value.ndim else [False] * len(shape)
    images = [values[i].shape[1:] for i in inputs if values[i].ndim > 3]
    sizes = {s for i in images for s in (i[1:], i[:-1])}  # channels first, or last

    def evidence(axis: Axis) -> tuple[bool, bool, bool, bool]:
        """What speaks for a reading, the strongest first."""
        if axis is None:
            single = task == "regression" or sigmoid
            return False, single and all(free), shape in sizes, single and bool(images)
        others = slice(1, None) if axis == 1 else slice(0, -1)
        fixed = not free[0 if axis == 1 else -1] and all(free[others])
        sums = task == "classification" and _sum_to_one(value, axis) and value.shape[axis] > 1
        return sums, fixed, shape[others] in sizes, value.shape[axis] == 1

    # Channels first for images, last for sequences: the habit of ONNX models.
    order: list[Axis] = [1, -1] if value.ndim > 3 else [-1, 1]
    if value.ndim == 3 or shape in sizes:
        order.append(None)
    return sorted(order, key=evidence, reverse=True)


def _sum_to_one(value: Array, axis: Axis) -> bool:
    rows = _rows(value, axis, _places(value, axis))
    return value.dtype.kind == "f" and are_probabilities(rows.reshape(-1, rows.shape[2]))


def _channels(value: Array, axis: Axis) -> int:
    return 1 if axis is None else value.shape[axis]


def _spatial_axes(value: Array, axis: Axis) -> int:
    return value.ndim - (1 if axis is None else 2)


def _count(value: Array, axis: Axis) -> int:
    """Pixels of an image."""
    return int(np.prod(value.shape[1:])) // max(1, _channels(value, axis))


def _places(value: Array, axis: Axis) -> I64:
    """The pixels that are looked at: all, or a few thousand of a large map."""
    count = _count(value, axis)
    if count <= _PIXELS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _PIXELS, replace=False))


def _rows(value: Array, axis: Axis, places: I64) -> Array:
    """The same pixels of every image, N×P×C."""
    return at(value, axis, np.broadcast_to(places, (len(value), len(places))))


def _spatial(spec: Sequence[int], axis: Axis, ndim: int) -> tuple[int, ...]:
    """The other axes of the output, as the graph has them."""
    tail = tuple(spec[1:]) if len(spec) == ndim else (-1,) * (ndim - 1)
    if axis is None:
        return tail
    return tail[1:] if axis == 1 else tail[:-1]


def _head(way: Walk, values: Probe, z: str, axis: Axis) -> tuple[Found | None, Axis, str]:
    """The layer that makes every pixel of z from the same pixel of φ, and φ's channel axis."""
    if way.found is None:
        return None, None, way.stop or "the outputs come from no linear layer"
    found = way.found
    if found.phi not in values or values[found.phi].ndim < 3:
        return None, None, f"{found.node!r} looks like one, but its input is no map"
    seen = _places(values[z], axis)
    want, count = _rows(values[z], axis, seen), _count(values[z], axis)
    value, columns = values[found.phi], found.linear.weight.shape[1]
    why = ""
    for phi_axis in (1, -1) if found.kind == "Conv" else (-1, 1):
        if _count(value, phi_axis) != count or value.shape[phi_axis] != columns:
            why = why or (
                f"its input has {_count(value, phi_axis):,} pixels of {value.shape[phi_axis]} "
                f"channels, the outputs {count:,}, and its weight {columns} columns"
            )
            continue
        phi = _rows(value, phi_axis, seen)
        why = mismatch_of(phi.reshape(-1, columns), want.reshape(-1, want.shape[2]), found)
        if not why:
            return found, phi_axis, ""
    return None, None, f"{found.node!r} looks like one, but {why}"


def channels(layout: Layout, values: Array) -> int:
    """C of a tensor in the layout of z."""
    return _channels(values, layout.axis)
