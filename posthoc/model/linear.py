"""Finds the last linear layer behind a tensor: φ, W and b with tensor = φ Wᵀ + b.

Everything here reads the graph only; `posthoc.frozen` checks what was found by running the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from posthoc.contract import F64, Array, LinearHead
from posthoc.model.quantised import Rounding, rounding
from posthoc.model.reader import SHAPES, Graph

# Operators that pick or average positions: they commute with a layer that acts on each position.
_POSITIONS = ("Gather", "GatherND", "Slice", "ReduceMean", "GlobalAveragePool")
_LAYERS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True)
class Found:
    """A linear layer: its name, the tensor φ it reads, and ``z = phi @ W.T + b``.

    A row of φ is flattened. In a quantised model z is what W and b give, kept within [``low``,
    ``high``] (C or 1) and rounded by at most ``step``. ``packed`` weights are stored in few bits
    behind a float φ; ONNX Runtime rounds φ too before it multiplies by them. ``kind`` is the
    operator's.
    """

    node: str
    phi: str
    linear: LinearHead
    step: float
    low: F64
    high: F64
    packed: bool
    kind: str = "MatMul"


def requantised(graph: Graph, tensor: str) -> tuple[Rounding, str] | None:
    """(rounding, x) of a tensor that is x quantised and dequantised; None for any other."""
    node = graph.maker(tensor, "DequantizeLinear")
    if node is None:
        return None
    source = graph.maker(_unshaped(graph, node.input[0]), "QuantizeLinear")
    if source is None:
        return None
    zero = graph.constant(source.input[2]) if len(source.input) > 2 else None
    if len(source.input) > 2 and zero is None:
        return None
    done = rounding(graph.constant(source.input[1]), zero)
    return None if done is None else (done, str(source.input[0]))


def _unshaped(graph: Graph, tensor: str) -> str:
    """What ``tensor`` is a reshaping of."""
    while (node := graph.maker(tensor, *SHAPES)) is not None:
        tensor = node.input[0]
    return tensor


def _dequantised(graph: Graph, tensor: str) -> bool:
    return graph.maker(_unshaped(graph, tensor), "DequantizeLinear") is not None


def find_linear(graph: Graph, tensor: str) -> tuple[Found | None, str]:
    """The linear layer whose result, scaled and shifted by constants, is ``tensor``.

    A scale (temperature, units of the target) and a shift are folded into W and b; a choice or a
    mean of positions that follows the layer is applied to φ instead, as new tensors of ``graph``.
    Returns the layer, or None and the reason.
    """
    scale: F64 = np.ones(1)
    shift: F64 = np.zeros(1)
    step, low, high = 0.0, np.full(1, -np.inf), np.full(1, np.inf)
    moved: list[onnx.NodeProto] = []
    factor = ""  # a scale that each batch has anew (dynamic quantisation)
    while (node := graph.makers.get(tensor)) is not None:
        where = f"{node.op_type} {node.name or node.output[0]!r}"
        picks = graph.maker(tensor, *_POSITIONS) is not None
        picks = picks and graph.constant(node.input[0]) is None  # or an embedding
        if node.op_type in SHAPES or picks:
            if moved or picks:
                moved.append(node)
            tensor = node.input[0]
            continue
        if (rounded := requantised(graph, tensor)) is not None:
            steps, tensor = rounded
            step += float(np.abs(scale).max()) * steps.scale
            ends = scale * steps.low + shift, scale * steps.high + shift
            low, high = np.maximum(low, np.minimum(*ends)), np.minimum(high, np.maximum(*ends))
            continue
        if graph.maker(tensor, *_LAYERS) is not None:
            layer = _layer(graph, node)
            if layer is None:
                return None, f"{where} has no constant float weight, or is not fully connected"
            phi, weight, bias = layer
            if {scale.size, shift.size, bias.size} - {1, len(weight)}:
                return None, f"{where} is scaled by constants of another size"
            whole = np.broadcast_to(scale * bias + shift, len(weight)).copy()
            head = LinearHead(scale.reshape(-1, 1) * weight, whole)
            packed = _dequantised(graph, node.input[1]) and not _dequantised(graph, phi)
            phi = _features(graph, phi, tensor, factor, moved)
            name = node.name or node.output[0]
            return Found(name, phi, head, step, low, high, packed, node.op_type), ""
        if not factor and (dynamic := _dynamic(graph, node)) is not None:
            tensor, factor, constant = dynamic
            scale = scale * constant
            continue
        affine = _affine(graph, node)
        if affine is None:
            return None, f"the outputs come from {where}"
        tensor, times, offset = affine
        sizes = {scale.size, shift.size, times.size, offset.size}
        if sizes - {1} - {max(sizes)}:
            return None, f"{where} has a constant of another size"
        shift = shift + scale * offset
        scale = scale * times
    return None, f"the outputs come straight from {tensor!r}"


def passes_on(graph: Graph, node: onnx.NodeProto, tensor: str) -> bool:
    """Whether the result of ``node`` is ``tensor`` reshaped, picked from, averaged over positions,
    quantised, or scaled and shifted by constants: what `find_linear` looks through."""
    result = node.output[0] if node.output else ""
    if graph.maker(result, *SHAPES, *_POSITIONS, "QuantizeLinear", "DequantizeLinear") is not None:
        return bool(node.input[0] == tensor)
    scaled = _affine(graph, node) or _dynamic(graph, node)
    return scaled is not None and scaled[0] == tensor


def _features(graph: Graph, phi: str, layer: str, factor: str, moved: list[onnx.NodeProto]) -> str:
    """φ times the scale of the batch, at the positions that the outputs are taken from."""
    prefix = f"hedged/{layer}/phi"
    if factor:
        graph.define(helper.make_node("Mul", [phi, factor], [f"{prefix}/scaled"]))
        phi = f"{prefix}/scaled"
    for i, node in enumerate(reversed(moved)):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        copy.input[0] = phi
        del copy.output[1:]  # a mask of Dropout
        phi = copy.output[0] = f"{prefix}/{i}"
        graph.define(copy)
    return phi


def _layer(graph: Graph, node: onnx.NodeProto) -> tuple[str, F64, F64] | None:
    """φ, W (C×D) and b of a MatMul, Gemm or Conv with a constant second operand.

    A Conv is one where its kernel covers its input (1×1 on a pooled map), D = channels × kernel.
    """
    raw = graph.constant(node.input[1])
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if raw is None or raw.dtype.kind != "f":
        return None
    term = None
    if len(node.input) > 2 and node.input[2]:
        term = graph.constant(node.input[2])
        if term is None or term.size != max(term.shape, default=1):
            return None
    bias = np.zeros(1) if term is None else term.astype(np.float64).ravel()
    if node.op_type == "Conv":
        if given.get("group", 1) != 1 or any(given.get("pads", ())):
            return None
        return node.input[0], raw.astype(np.float64).reshape(len(raw), -1), bias
    if raw.ndim > 2 or (raw.ndim == 1 and node.op_type == "Gemm"):
        return None
    weight = raw.astype(np.float64).reshape(raw.shape[0], -1)  # D×C
    if node.op_type == "Gemm":
        if given.get("transA", 0):
            return None  # features with the batch last
        weight = (weight.T if given.get("transB", 0) else weight) * given.get("alpha", 1.0)
        bias = bias * given.get("beta", 1.0)
    return node.input[0], np.ascontiguousarray(weight.T), bias


def _dynamic(graph: Graph, node: onnx.NodeProto) -> tuple[str, str, F64] | None:
    """(x, s, c) of x · (s · c): s the scale that DynamicQuantizeLinear took, c constant."""
    if node.op_type != "Mul":
        return None
    for x, factor in (tuple(node.input), tuple(reversed(node.input))):
        product = graph.maker(factor, "Mul")
        constant: Array = np.ones(1)
        for s in (factor,) if product is None else product.input:
            maker = graph.maker(s, "DynamicQuantizeLinear")
            if maker is None or s != maker.output[1]:
                continue
            if product is not None:
                other = next(i for i in product.input if i != s)
                found = graph.constant(other)
                if found is None:
                    continue
                constant = found
            return str(x), str(s), constant.astype(np.float64).ravel()
    return None


def _affine(graph: Graph, node: onnx.NodeProto) -> tuple[str, F64, F64] | None:
    """(x, a, b) of a node that is a·x + b with constant a and b; None for any other node."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization" and len(node.output) == 1:
        return _normalisation(graph, node)
    if node.op_type not in {"Add", "Sub", "Mul", "Div"}:
        return None
    left, right = (graph.constant(i) for i in node.input)
    if (left is None) == (right is None):
        return None
    constant = left if left is not None else right
    assert constant is not None
    x = str(node.input[1 if left is not None else 0])
    c = constant.astype(np.float64).ravel()
    if constant.size != max(constant.shape, default=1):
        return None  # more than one number for an output
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Add":
        return x, one, c
    if node.op_type == "Sub":
        return (x, one, -c) if right is not None else (x, -one, c)
    if node.op_type == "Mul":
        return x, c, zero
    return (x, 1 / c, zero) if right is not None and (c != 0).all() else None


def _normalisation(graph: Graph, node: onnx.NodeProto) -> tuple[str, F64, F64] | None:
    terms = [graph.constant(i) for i in node.input[1:5]]
    if any(t is None for t in terms):
        return None
    gamma, beta, mean, variance = (np.asarray(t, np.float64) for t in terms)
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    times = gamma / np.sqrt(variance + given.get("epsilon", 1e-5))
    return str(node.input[0]), times, beta - times * mean
