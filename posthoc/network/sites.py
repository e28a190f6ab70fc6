"""Where noise can act inside a frozen network: its dropouts, its normalisations, named tensors."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import helper

from posthoc.contract import F64, Array, ModelError
from posthoc.model.renaming import tensor_names
from posthoc.network import norms
from posthoc.network.batch import Layout, Layouts
from posthoc.network.dependence import CONSTANT, STANDARD, before, levels, producers

Kind = Literal["dropout", "batch", "layer", "group", "instance", "rms", "tensor"]

CHANNELS = "channel_dropout/"  # name of a Dropout node that drops channels whole (Dropout2d)
_RATE = 0.5  # of a Dropout that says none
_SHOWN = 8
_FIRST = frozenset(  # act on channels in axis 1
    {"AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool"}
    | {"GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "MaxPool"}
)
_LAST = frozenset({"Gemm", "LayerNormalization", "MatMul", "RMSNormalization"})
_THROUGH = frozenset(
    {"Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish"}
    | {"Identity", "LeakyRelu", "Mish", "Mul", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus"}
    | {"Sub", "Tanh"}
)


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor that is replaced, in each sample, for every node that reads it.

    ``axis`` is that of the channels and ``batch`` that of the rows; ``shape`` is a row's shape,
    without the axis of the rows, -1 where a size is free. ``channels`` is -1 where it is. ``gamma``
    and ``beta`` (C) are a normalisation's: the tensor holds gamma·u + beta. ``variance_eps`` are
    the running variance (C) and ε of a BatchNormalization. ``rate`` is a dropout's, and ``whole``
    says that it drops channels, not elements. ``node`` is for messages.
    """

    tensor: str
    kind: Kind
    axis: int
    channels: int
    shape: tuple[int, ...]
    node: str
    gamma: F64 | None = None
    beta: F64 | None = None
    variance_eps: tuple[F64, float] | None = None
    rate: float | None = None
    whole: bool = False
    batch: int = 0

    def along(self, values: Array) -> Array:
        """Values S×C as S×1×…×C×…×1, to broadcast against a row: what `fold.Noise` takes."""
        at = self.axis if self.axis > self.batch else self.axis + 1
        shape = [1] * (len(self.shape) + 1)
        shape[0], shape[at] = values.shape
        return values.reshape(shape)


def find_dropouts(
    model: bytes, probe: Mapping[str, Array] | None = None, *, output: str | None = None
) -> list[Site]:
    """The Dropout nodes of a model in topological order, their rates as stored (0.5 where they say
    none); of those, with ``output``, that lead to it. ``probe`` are real rows by input, for sizes
    that the graph does not tell. A rate of 0, and one that is computed, is none."""
    proto = onnx.load_from_string(model)
    found: list[tuple[str, str, float]] = []
    reader = norms.Reader(proto)
    for node in proto.graph.node:
        if node.op_type != "Dropout" or node.domain not in STANDARD:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        rate: float | None = float(given.get("ratio", _RATE))
        if len(node.input) > 1 and node.input[1]:
            stored = reader.constant(node.input[1])
            known = stored is not None and stored.size == 1
            rate = float(f"{stored.item():.6g}") if known and stored is not None else None
        if rate:
            found.append((node.output[0], node.name or node.output[0], rate))
    seen = _seen(proto, [t for t, _, _ in found], probe, output)
    return [
        _site(proto, t, "dropout", seen[t], name, rate=rate, whole=name.startswith(CHANNELS))
        for t, name, rate in found
        if t in seen
    ]


def find_normalisations(
    model: bytes, probe: Mapping[str, Array] | None = None, *, output: str | None = None
) -> list[Site]:
    """The normalisations with a scale for each channel, in topological order: Batch-, Layer-,
    Group-, Instance- and RMSNormalization, and those that an exporter took apart
    (`posthoc.network.norms`). ``probe`` and ``output`` as in `find_dropouts`. Where there is none,
    `normalisation_hint` says what would help."""
    proto = onnx.load_from_string(model)
    found = norms.find(proto)
    seen = _seen(proto, [n.tensor for n in found], probe, output)
    sites = []
    for norm in found:
        layout = seen.get(norm.tensor)
        if layout is None:
            continue
        rank = len(layout.dims)
        axis = norm.axis % rank
        gamma, beta, channels = norm.gamma, norm.beta, layout.dims[axis]
        if norm.groups == len(gamma) and channels > 0:  # opset 18: one γ for each group
            gamma, beta = (np.repeat(v, channels // len(v)) for v in (gamma, beta))
        if axis == layout.batch or channels not in (-1, len(gamma)):
            continue
        sites.append(
            Site(
                tensor=norm.tensor,
                kind=norm.kind,
                axis=axis,
                channels=len(gamma),
                shape=layout.row,
                node=norm.node,
                gamma=gamma,
                beta=beta,
                variance_eps=norm.variance_eps,
                batch=layout.batch or 0,
            )
        )
    return sites


def normalisation_hint(model: bytes) -> str:
    """What would make normalisations show, for a model in which there are none."""
    kinds = {node.op_type for node in onnx.load_from_string(model).graph.node}
    where = "no normalisation with a scale for each channel is left in this graph"
    if "Conv" in kinds:
        where += " (exporters fold BatchNormalization into the convolution before it)"
    return (
        f"{where}; give the torch module itself (module:factory), which is exported with its "
        "normalisations, or export it with torch.onnx.export(..., optimize=False) or, with the "
        "older exporter, training=TrainingMode.PRESERVE and do_constant_folding=False; or use "
        "mc_dropout at a named tensor"
    )


def named(
    model: bytes, names: Sequence[str], probe: Mapping[str, Array] | None = None
) -> list[Site]:
    """Sites at named tensors. Raises ModelError for a name that the model does not have, with
    those most like it, and for a tensor that does not hold floats with the rows in one axis."""
    proto = onnx.load_from_string(model)
    known = levels(proto.graph)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known], _SHOWN, 0.5)
            near = near or [n for n in tensor_names(proto.graph) if name in n][:_SHOWN]
            advice = f"; like it are {', '.join(map(repr, near))}" if near else ""
            raise ModelError(f"the model has no tensor {name!r}{advice}")
    layouts = Layouts(proto, probe)
    layouts.look(n for n in names if known[n] != CONSTANT)
    makers = producers(proto.graph)
    sites = []
    for name in names:
        layout = layouts[name] if known[name] != CONSTANT else None
        if layout is None:
            raise ModelError(f"{name!r} does not depend on the inputs; choose another tensor")
        if not layout.dtype.startswith("float"):
            raise ModelError(f"{name!r} holds {layout.dtype}; noise needs a tensor of floats")
        if layout.batch is None or len(layout.dims) < 2:
            raise ModelError(
                f"{name!r} of shape {layout.dims} does not hold the rows in one axis and channels "
                "in another; choose a tensor with the batch in axis 0"
            )
        node = makers.get(name)
        where = name if node is None else f"{node.op_type} {node.name or name}"
        sites.append(_site(proto, name, "tensor", layout, where))
    return sites


def _seen(
    proto: onnx.ModelProto,
    tensors: Sequence[str],
    probe: Mapping[str, Array] | None,
    output: str | None,
) -> dict[str, Layout]:
    """The layouts of those tensors that hold rows, and lead to ``output``."""
    wanted = set(tensors) if output is None else before(proto.graph.node, output)
    known = levels(proto.graph)
    tensors = [t for t in tensors if t in wanted and known[t] != CONSTANT]
    if not tensors:
        return {}
    layouts = Layouts(proto, probe)
    layouts.look(tensors)
    found = ((t, layouts[t]) for t in tensors)
    return {t: x for t, x in found if x is not None and x.batch is not None and len(x.dims) > 1}


def _site(
    proto: onnx.ModelProto,
    tensor: str,
    kind: Kind,
    layout: Layout,
    node: str,
    *,
    rate: float | None = None,
    whole: bool = False,
) -> Site:
    rank, batch = len(layout.dims), layout.batch or 0
    axis = 1 if whole else _channel_axis(proto, tensor, rank)
    axis = axis if axis != batch else rank - 1 if batch != rank - 1 else 0
    return Site(
        tensor=tensor,
        kind=kind,
        axis=axis,
        channels=layout.dims[axis],
        shape=layout.row,
        node=node,
        rate=rate,
        whole=whole,
        batch=batch,
    )


def _channel_axis(proto: onnx.ModelProto, tensor: str, rank: int) -> int:
    """The axis of the channels, by the nearest layer before or behind: 1 of a convolution, the last
    of a matrix product; without one, the last of three axes and else 1."""
    makers = producers(proto.graph)

    def back(name: str) -> Iterable[tuple[str, Iterable[str]]]:
        node = makers.get(name)
        return [] if node is None else [(node.op_type, node.input)]

    def ahead(name: str) -> Iterable[tuple[str, Iterable[str]]]:
        return [(n.op_type, n.output) for n in proto.graph.node if name in n.input]

    for step in (back, ahead):
        todo, seen = deque([tensor]), {tensor}
        while todo:
            for kind, others in step(todo.popleft()):
                if kind in _FIRST:
                    return 1
                if kind in _LAST:
                    return rank - 1
                if kind in _THROUGH:
                    todo.extend(o for o in others if o not in seen)
                    seen.update(others)
    return 2 if rank == 3 else 1
