"""ONNX surgery: write a head as a fragment, join it behind the frozen graph.

A ``Fragment`` collects nodes and constants; method and score pages add to it. The head is written
in the frozen model's own opset (13 or newer), because one graph has one opset, so only operators
that mean the same from 13 on are used; the few whose form changed go through a method here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from posthoc.contract import Array, ModelError

HEAD_OPSET = 20  # of a head that stands alone; ONNX Runtime 1.28 and newer load it
IR_VERSION = 10
_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


class Fragment:
    """A growing piece of ONNX graph. Every method returns the name of the tensor it made."""

    def __init__(self, opset: int = HEAD_OPSET, prefix: str = "uq/"):
        if opset < 13:
            raise ModelError(
                f"opset {opset} is too old for a head; convert the model to 13 or newer"
            )
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._prefix = prefix
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._published: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """One node with one output."""
        name = out or f"{self._prefix}{len(self.nodes)}/{kind}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def op2(self, kind: str, *inputs: str, **attributes: Any) -> tuple[str, str]:
        """One node with two outputs (TopK)."""
        name = f"{self._prefix}{len(self.nodes)}/{kind}"
        outs = (name, name + "/1")
        self.nodes.append(helper.make_node(kind, list(inputs), list(outs), **attributes))
        return outs

    def publish(self, name: str, out: str) -> None:
        """Give the tensor ``name`` the public name ``out``: a copy only where the tensor is not of
        our making, or has a public name already."""
        if name in self._published or not any(name in node.output for node in self.nodes):
            self.op("Identity", self._published.get(name, name), out=out)
            return
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [out if n == name else n for n in names]
        self._published[name] = out

    def const(self, value: Array | float | Sequence[Any], dtype: str = "float32") -> str:
        """A constant tensor; equal ones are stored once."""
        array = np.asarray(value, dtype=np.dtype(dtype), order="C")
        key = (dtype, array.shape, array.tobytes())
        if key not in self._known:
            name = f"{self._prefix}const/{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, name))
            self._known[key] = name
        return self._known[key]

    def reduce(self, kind: str, x: str, *axes: int, keepdims: bool = False) -> str:
        """ReduceMax, ReduceMean, ReduceMin: axes became an input in opset 18."""
        if self.opset >= 18:
            return self.op(kind, x, self.const(axes, "int64"), keepdims=int(keepdims))
        return self.op(kind, x, axes=list(axes), keepdims=int(keepdims))

    def sum(self, x: str, *axes: int, keepdims: bool = False) -> str:
        """ReduceSum."""
        return self.op("ReduceSum", x, self.const(axes, "int64"), keepdims=int(keepdims))

    def unsqueeze(self, x: str, axis: int) -> str:
        """A new axis of length one."""
        return self.op("Unsqueeze", x, self.const([axis], "int64"))

    def cast(self, x: str, dtype: str) -> str:
        """Another type."""
        return self.op("Cast", x, to=_ONNX_TYPES[dtype])

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """A required graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, _ONNX_TYPES[dtype], list(shape)))
        return name

    def optional_input(
        self, name: str, default: Array | float, axis: str, dtype: str = "float32"
    ) -> str:
        """An input of shape [axis, …] with a ``default`` of one row of it, which broadcasts."""
        value = np.asarray(default, np.dtype(dtype))[None]
        shape = [axis, *value.shape[1:]]
        self.inputs.append(helper.make_tensor_value_info(name, _ONNX_TYPES[dtype], shape))
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def emit_count_below(g: Fragment, table: Array, x: str) -> str:
    """How many of an ascending ``table`` M lie below each of ``x`` N, as float32 (exact: M < 2²⁴).

    Two looks at about √M numbers each: at the ends of blocks, then into one block.
    """
    values = np.asarray(table, np.float32)
    size = max(1, math.isqrt(len(values)))
    blocks = -(-len(values) // size)
    rest = np.full((blocks + 1) * size - len(values), np.inf, np.float32)
    padded = np.append(values, rest).reshape(-1, size)
    column = g.unsqueeze(x, 1)

    def count(thresholds: str) -> str:
        # Counted in float32, far faster than an integer sum.
        return g.sum(g.cast(g.op("Less", thresholds, column), "float32"), 1)

    whole = count(g.const(padded[:-1, -1][None]))
    inside = count(g.op("Gather", g.const(padded), g.cast(whole, "int64"), axis=0))
    return g.op("Add", g.op("Mul", whole, g.const(float(size))), inside)


def _value_info(name: str, dtype: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    free = [None if d == -1 else d for d in shape[1:]]
    dims: list[str | int | None] = ["N", *free] if shape else []
    return helper.make_tensor_value_info(name, _ONNX_TYPES[dtype], dims)


def pruned(fragment: Fragment, outputs: Iterable[str]) -> tuple[list[Any], list[Any]]:
    """(nodes, constants) that the outputs need: a page may describe more than a head asks for."""
    needed, nodes = set(outputs), []
    for node in reversed(fragment.nodes):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    inputs = {i.name for i in fragment.inputs}
    constants = [c for c in fragment.constants if c.name in needed or c.name in inputs]
    return nodes[::-1], constants


def standalone(
    fragment: Fragment, outputs: Mapping[str, tuple[str, Sequence[int]]], name: str = "head"
) -> bytes:
    """The fragment as a model of its own. ``outputs``: tensor -> (dtype, shape with -1 batch)."""
    nodes, constants = pruned(fragment, outputs)
    graph = helper.make_graph(
        nodes,
        name,
        fragment.inputs,
        [_value_info(n, d, s) for n, (d, s) in outputs.items()],
        constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", fragment.opset)],
        ir_version=IR_VERSION,
        producer_name="hedged",
    )
    return checked(model)


def append(
    frozen: bytes, fragment: Fragment, outputs: Mapping[str, tuple[str, Sequence[int]]]
) -> bytes:
    """The frozen model with the fragment behind it; its own inputs and outputs stay as they are.

    Raises ModelError when the joined graph is not valid.
    """
    model = onnx.load_from_string(frozen)
    nodes, constants = pruned(fragment, outputs)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    model.graph.input.extend(fragment.inputs)
    model.graph.output.extend(_value_info(n, d, s) for n, (d, s) in outputs.items())
    # Inputs with defaults need IR 4; older files also listed every initializer as an input.
    model.ir_version = max(model.ir_version, 8)
    return checked(model)


def taken_names(frozen: bytes) -> set[str]:
    """Every tensor name of a model; ours must not be among them."""
    graph = onnx.load_from_string(frozen).graph
    names = {i.name for i in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        names.update(node.input)
        names.update(node.output)
    return names


def checked(model: onnx.ModelProto) -> bytes:
    """The serialised model after the checker passed it; ModelError otherwise."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as e:
        raise ModelError(f"the fused graph is not valid ONNX: {str(e).splitlines()[0]}") from e
    return bytes(model.SerializeToString())
