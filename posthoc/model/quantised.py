"""Quantised operators as what they compute: float operators between (de)quantisations.

The walk for the head reads `as_float` of each node, so that it knows float operators,
QuantizeLinear and DequantizeLinear only. The model that runs keeps its own nodes; a tensor that
exists in this reading alone is added to it where it is to be exposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from posthoc.contract import Array

_LINEAR = {"QLinearMatMul": "MatMul", "QLinearConv": "Conv", "QGemm": "Gemm"}
_INTEGER = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
_FUNCTIONS = {"QLinearSoftmax": "Softmax", "QLinearSigmoid": "Sigmoid"}
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_KEPT = frozenset(
    {"alpha", "auto_pad", "axis", "dilations", "group", "kernel_shape", "pads", "strides"}
    | {"transA", "transB"}
)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Quantisation to steps of ``scale`` within [``low``, ``high``], all in units of the value."""

    scale: float
    low: float
    high: float

    def __call__(self, value: Array) -> Array:
        """``value`` rounded to the nearest step and kept within the range."""
        clipped = np.clip(value, self.low, self.high)
        return np.asarray(self.low + np.rint((clipped - self.low) / self.scale) * self.scale)


def rounding(scale: Array | None, zero: Array | None) -> Rounding | None:
    """What a QuantizeLinear with these constants does; None for any that is not per tensor."""
    if scale is None or scale.size != 1 or not float(scale.ravel()[0]) > 0:
        return None
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    if kind.kind not in "iu" or (zero is not None and zero.size != 1):
        return None
    step, offset = float(scale.ravel()[0]), 0 if zero is None else int(zero.ravel()[0])
    limits = np.iinfo(kind)
    return Rounding(step, (limits.min - offset) * step, (limits.max - offset) * step)


def as_float(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes that stand for a quantised operator; the node alone for any other.

    ONNX: QLinearMatMul, QLinearConv, MatMulInteger, ConvInteger. ONNX Runtime (com.microsoft):
    QGemm, QLinearAdd, QLinearSoftmax, QLinearSigmoid. The last node makes the operator's result.
    """
    kind = node.op_type if node.domain in _DOMAINS else ""
    if kind in _LINEAR:
        return _linear(node)
    if kind in _INTEGER:
        return _integer(node)
    i, at = [*node.input, "", "", ""], f"hedged/{node.output[0]}/"
    if kind == "QLinearAdd":
        return [
            _dequantize(i[0:3], at + "a"),
            _dequantize(i[3:6], at + "b"),
            helper.make_node("Add", [at + "a", at + "b"], [at + "y"], name=node.name),
            _quantize([at + "y", i[6], i[7]], node.output[0]),
        ]
    if kind in _FUNCTIONS:
        return [
            _dequantize(i[0:3], at + "a"),
            helper.make_node(_FUNCTIONS[kind], [at + "a"], [at + "y"], **_attributes(node)),
            _quantize([at + "y", i[3], i[4]], node.output[0]),
        ]
    return [node]


def _linear(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """QLinearMatMul and QLinearConv: a, b and y each with scale and zero point, then the bias.
    QGemm: the bias comes before y, and y may be left in float."""
    i, at = [*node.input, "", "", "", ""], f"hedged/{node.output[0]}/"
    gemm, conv = node.op_type == "QGemm", node.op_type == "QLinearConv"
    bias, scale, zero = (i[6], i[7], i[8]) if gemm else (i[8], i[6], i[7])
    attributes = _attributes(node)
    if gemm:
        attributes["beta"] = attributes.get("alpha", 1.0)  # alpha is in the scale of the bias
    nodes = [
        _dequantize(i[0:3], at + "a"),
        # Scales per output channel: rows of a transposed or convolution weight, else columns.
        _dequantize(i[3:6], at + "b", axis=0 if conv or attributes.get("transB") else -1),
    ]
    terms = [at + "a", at + "b"]
    if (gemm or conv) and bias:
        nodes.append(helper.make_node("Mul", [i[1], i[4]], [at + "s"]))
        nodes.append(_dequantize([bias, at + "s", ""], at + "c", axis=0))
        terms.append(at + "c")
    out = at + "y" if scale else node.output[0]
    name = node.name or node.output[0]
    nodes.append(helper.make_node(_LINEAR[node.op_type], terms, [out], name=name, **attributes))
    if scale:
        nodes.append(_quantize([out, scale, zero], node.output[0]))
    return nodes


def _integer(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A product of integers less their zero points; the scales are multiplied in later."""
    (a, b, za, zb), at = [*node.input, "", ""][:4], f"hedged/{node.output[0]}/"
    nodes = [
        helper.make_node("Constant", [], [at + "one"], value_float=1.0),
        _dequantize([a, at + "one", za], at + "a"),
        helper.make_node("Cast", [b], [at + "b"], to=onnx.TensorProto.FLOAT),
    ]
    weight = at + "b"
    if zb:
        nodes.append(helper.make_node("Cast", [zb], [at + "zero"], to=onnx.TensorProto.FLOAT))
        nodes.append(helper.make_node("Sub", [weight, at + "zero"], [at + "w"]))
        weight = at + "w"
    name = node.name or node.output[0]
    kind, attributes = _INTEGER[node.op_type], _attributes(node)
    out = [node.output[0]]
    return [*nodes, helper.make_node(kind, [at + "a", weight], out, name=name, **attributes)]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in _KEPT}


def _dequantize(parts: list[str], out: str, axis: int = 1) -> onnx.NodeProto:
    value, scale, zero = parts
    inputs = [value, scale, zero] if zero else [value, scale]
    return helper.make_node("DequantizeLinear", inputs, [out], axis=axis)


def _quantize(parts: list[str], out: str) -> onnx.NodeProto:
    value, scale, zero = parts
    inputs = [value, scale, zero] if zero else [value, scale]
    return helper.make_node("QuantizeLinear", inputs, [out])
