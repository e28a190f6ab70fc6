"""Finds z, its head and where the channels are, in a model whose output is a map.

The counterpart of `posthoc.model.agreement` for N×C×H×W, N×H×W×C, N×T×C and N×H×W: what the walks
suggest is believed where every pixel of it agrees with the model's own output on the probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc.contract import Array, ModelError, Task
from posthoc.model.agreement import apply_steps, are_probabilities, mismatch_of
from posthoc.model.heads import Walk
from posthoc.model.linear import Found
from posthoc.model.probe import Probe
from posthoc.pixels import Layout, pixels

Axis = int | None


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
    or more of which some are free."""
    if value.ndim < 3:
        return False
    wide = sum(d > 1 or s == -1 for d, s in zip(value.shape[1:], spec[1:], strict=True))
    return bool(wide >= 2)


def dense_output(
    walks: Sequence[Walk],
    values: Probe,
    name: str,
    spec: Sequence[int],
    task: Task,
    head: str | None,
) -> DenseOutput:
    """z, its layout and its head, for the output ``name`` whose shape in the graph is ``spec``.

    Raises ModelError for an output that is no map of floats (or, where z is found, of classes), and
    where ``head`` is no linear layer of it.
    """
    whole = values[name]
    for way in walks:
        for z, axis, out in _candidates(way, values, whole, task):
            if not apply_steps(way.steps, pixels(values[z], axis), _rows(whole, out)):
                continue
            layout = Layout(axis, out, _spatial(spec, out, whole.ndim))
            found, phi_axis, stop = _head(way, values, z, axis)
            if found is None and not way.steps and way.found is not None:
                continue  # another reading of the axes may show the head
            return _made(way, z, layout, phi_axis, found, stop, values, task)
    if head is not None:
        raise ModelError(f"output {name!r} is not what {head!r} gives, pixel by pixel")
    for way in walks:
        for z, axis, out in _candidates(way, values, whole, task):
            if apply_steps(way.steps, pixels(values[z], axis), _rows(whole, out)):
                layout = Layout(axis, out, _spatial(spec, out, whole.ndim))
                _, _, stop = _head(way, values, z, axis)
                return _made(way, z, layout, None, None, stop, values, task)
    if whole.dtype.kind != "f":
        raise ModelError(
            f"output {name!r} holds {whole.dtype} maps of shape {whole.shape[1:]} and what they "
            "were made from was not found; name an output of floats with --output"
        )
    out = _default(whole.ndim)
    way = Walk((), (), (), None, "the operators before the output are not what they seem")
    layout = Layout(out, out, _spatial(spec, out, whole.ndim))
    return _made(way, name, layout, None, None, way.stop, values, task)


def _made(
    way: Walk,
    z: str,
    layout: Layout,
    phi_axis: Axis,
    found: Found | None,
    stop: str,
    values: Probe,
    task: Task,
) -> DenseOutput:
    layout = Layout(layout.axis, layout.out_axis, layout.spatial, phi_axis)
    rows = pixels(values[z], layout.axis)
    flat = rows.reshape(-1, rows.shape[2])
    probs = task == "classification" and not way.steps and are_probabilities(flat)
    return DenseOutput(way, z, layout, found, stop, probs)


def _candidates(
    way: Walk, values: Probe, output: Array, task: Task
) -> Iterator[tuple[str, Axis, Axis]]:
    """(z, its channel axis, the output's), the likeliest first."""
    for name in reversed(way.path):
        value = values[name]
        if value.dtype.kind != "f" or value.ndim < 3 or len(value) != len(output):
            continue
        same = value.ndim == output.ndim
        plain = same and (task == "regression" or not way.steps)
        if same and "sigmoid" in way.steps and 1 not in (value.shape[1], value.shape[-1]):
            yield name, None, None  # one logit a pixel
        for axis in _axes(value.ndim, way):
            if not same and ("argmax" in way.steps or value.shape[axis] == 1):
                yield name, axis, None
            elif "argmax" not in way.steps:
                # The same axis first, then what a transposition in between would have made of it.
                for out in dict.fromkeys([axis, 1, -1]) if same else (1, -1):
                    yield name, axis, out
        if plain:
            yield name, None, None


def _axes(ndim: int, way: Walk) -> tuple[int, int]:
    """Channel axes to try: the layer's own first."""
    if way.found is not None:
        return (1, -1) if way.found.kind == "Conv" else (-1, 1)
    return (1, -1) if _default(ndim) == 1 else (-1, 1)


def _default(ndim: int) -> int:
    """Channels first for images, last for sequences: the habit of ONNX models."""
    return 1 if ndim > 3 else -1


def _rows(output: Array, axis: Axis) -> Array:
    return output.reshape(len(output), -1) if axis is None else pixels(output, axis)


def _spatial(spec: Sequence[int], axis: Axis, ndim: int) -> tuple[int, ...]:
    """The other axes of the output, as the graph has them."""
    tail = tuple(spec[1:]) if len(spec) == ndim else (-1,) * (ndim - 1)
    if axis is None:
        return tail
    return tail[1:] if axis == 1 else tail[:-1]


def _head(way: Walk, values: Probe, z: str, axis: Axis) -> tuple[Found | None, Axis, str]:
    """The layer that makes every pixel of z from the same pixel of φ, and φ's channel axis."""
    if way.found is None or axis is None:
        return None, None, way.stop or "the output has no axis of channels"
    found = way.found
    if found.phi not in values or values[found.phi].ndim < 3:
        return None, None, f"{found.node!r} looks like one, but its input is no map"
    want = pixels(values[z], axis)
    why = ""
    for phi_axis in (1, -1) if found.kind == "Conv" else (-1, 1):
        phi = pixels(values[found.phi], phi_axis)
        if phi.shape[1] != want.shape[1] or phi.shape[2] != found.linear.weight.shape[1]:
            why = why or (
                f"its input has {phi.shape[1]:,} pixels of {phi.shape[2]} channels, the outputs "
                f"{want.shape[1]:,}, and its weight {found.linear.weight.shape[1]} columns"
            )
            continue
        width = want.shape[2]
        why = mismatch_of(phi.reshape(-1, phi.shape[2]), want.reshape(-1, width), found)
        if not why:
            return found, phi_axis, ""
    return None, None, f"{found.node!r} looks like one, but {why}"


def channels(layout: Layout, values: Array) -> int:
    """C of a tensor in the layout of z."""
    return 1 if layout.axis is None else int(np.shape(values)[layout.axis])
