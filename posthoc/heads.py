"""Walks an ONNX graph back from an output to the outputs z and the last linear layer.

Everything here reads the graph only; `posthoc.frozen` checks what was found by running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import onnx
from onnx import helper, numpy_helper

from posthoc.contract import F64, Array, LinearHead, ModelError
from posthoc.runtime import open_session

Step = Literal["softmax", "log_softmax", "sigmoid", "log", "argmax"]

# Operators of a tail that leave the values alone.
_SHAPES = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout"})
_LINKS: Mapping[str, Step] = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "Log": "log",
    "ArgMax": "argmax",
}
_FOLDED = _SHAPES | {"Transpose", "Concat", "Mul", "Add", "Sub", "Div"}
_IR = 8  # old enough for any opset that is walked
_DEPTH = 64  # of constant expressions and of the walk through what normalises a softmax


@dataclass(frozen=True, slots=True)
class Found:
    """A linear layer: its name, the tensor φ it reads, and ``z = phi @ W.T + b``."""

    node: str
    phi: str
    linear: LinearHead


@dataclass(frozen=True, slots=True)
class Walk:
    """What lies between a linear layer and an output.

    ``path`` are the tensors with the values of z, outermost first (``inner`` is the last);
    ``steps`` the functions that turn z into the output, innermost first; ``tail`` the operators
    passed, outermost first. ``stop`` says in words why the head was not found.
    """

    path: tuple[str, ...]
    steps: tuple[Step, ...]
    tail: tuple[str, ...]
    found: Found | None
    stop: str

    @property
    def inner(self) -> str:
        """The tensor with the values of z that is nearest to the head."""
        return self.path[-1]


class Graph:
    """The top level of a model: who makes a tensor, and which tensors are constant."""

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.makers: dict[str, onnx.NodeProto] = {
            out: node for node in model.graph.node for out in node.output if out
        }
        self._values = {t.name: t for t in model.graph.initializer}
        self._known: dict[str, Array | None] = {}

    def constant(self, name: str, depth: int = _DEPTH) -> Array | None:
        """Value of a tensor that does not depend on the inputs; None for one that does."""
        if name not in self._known:
            self._known[name] = self._evaluate(name, depth)
        return self._known[name]

    def _evaluate(self, name: str, depth: int) -> Array | None:
        if name in self._values:
            return np.asarray(numpy_helper.to_array(self._values[name]))
        node = self.makers.get(name)
        if node is None or depth == 0 or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type != "Constant":
            if node.op_type not in _FOLDED:
                return None
            if any(self.constant(i, depth - 1) is None for i in node.input if i):
                return None
        feed = {i: v for i in node.input if (v := self._known.get(i)) is not None}
        return _run_node(node, feed, self.model.opset_import)


def _run_node(node: onnx.NodeProto, feed: Mapping[str, Array], opsets: Any) -> Array | None:
    graph = helper.make_graph(
        [node],
        "constant",
        [],
        [onnx.ValueInfoProto(name=node.output[0])],
        [numpy_helper.from_array(cast(Any, value), name) for name, value in feed.items()],
    )
    model = helper.make_model(graph, opset_imports=list(opsets), ir_version=_IR)
    try:
        return np.asarray(open_session(model.SerializeToString()).run(None, {})[0])
    except Exception:  # a sparse or exotic constant: not one that a linear layer is made of
        return None


def walk(graph: Graph, output: str, *, links: bool) -> Walk:
    """Back from ``output`` through shape operators and, with ``links``, softmax, sigmoid and
    argmax to z, and to the last linear layer behind z."""
    path, steps, tail = [output], list[Step](), list[str]()
    while (node := graph.makers.get(path[-1])) is not None:
        kind, source = node.op_type, node.input[0] if node.input else ""
        if kind in _SHAPES:
            step = None
        elif links and kind in _LINKS:
            step = _LINKS[kind]
        elif links and (inner := _decomposed(graph, node)) is not None:
            step, source = inner
            kind = "Softmax" if step == "softmax" else "LogSoftmax"
        else:
            break
        if source not in graph.makers:
            break
        tail.append(kind)
        if step is not None:
            steps.append(step)
        path = [source] if step is not None else [*path, source]
    found, stop = find_linear(graph, path[-1])
    return Walk(tuple(path), tuple(reversed(steps)), tuple(tail), found, stop)


def walks_from(graph: Graph, head: str) -> list[Walk]:
    """Every way that an output may follow from the layer ``head`` (a node, or its result).

    The outputs are its result, constants added or multiplied included, or a function of it; which
    one is for the caller to check. Raises ModelError when there is no such linear layer.
    """
    nodes = graph.model.graph.node
    node = next((n for n in nodes if head == n.name or head in n.output), None)
    if node is None:
        raise ModelError(f"the model has no node {head!r}")
    tensors = [str(node.output[0])]
    for after in nodes:
        affine = _affine(graph, after)
        if affine is not None and affine[0] == tensors[-1]:
            tensors.append(after.output[0])
    found, stop = find_linear(graph, tensors[0])
    if found is None:
        raise ModelError(f"{head!r} is not a linear layer: {stop}")
    ways: list[tuple[tuple[Step, ...], tuple[str, ...]]] = [((), ())]
    ways += [((step,), (kind,)) for kind, step in _LINKS.items() if step != "log"]
    return [
        Walk((tensor,), steps, tail, *find_linear(graph, tensor))
        for tensor in reversed(tensors)
        for steps, tail in ways
    ]


def find_linear(graph: Graph, tensor: str) -> tuple[Found | None, str]:
    """The linear layer whose result, scaled and shifted by constants, is ``tensor``.

    A scale (temperature, units of the target) and a shift are folded into W and b. Returns the
    layer, or None and the reason.
    """
    scale: Array = np.ones(1)
    shift: Array = np.zeros(1)
    while (node := graph.makers.get(tensor)) is not None:
        where = f"{node.op_type} {node.name or node.output[0]!r}"
        if node.op_type in _SHAPES:
            tensor = node.input[0]
            continue
        if node.op_type in {"MatMul", "Gemm"} and node.domain in ("", "ai.onnx"):
            layer = _layer(graph, node)
            if layer is None:
                return None, f"{where} has no constant float weight"
            phi, weight, bias = layer
            if {scale.size, shift.size, bias.size} - {1, len(weight)}:
                return None, f"{where} is scaled by constants of another size"
            whole = np.broadcast_to(scale * bias + shift, len(weight)).copy()
            head = LinearHead(scale.reshape(-1, 1) * weight, whole)
            return Found(node.name or node.output[0], phi, head), ""
        affine = _affine(graph, node)
        if affine is None:
            return None, f"the outputs come from {where}"
        tensor, factor, offset = affine
        if (
            {scale.size, shift.size, factor.size, offset.size}
            - {1}
            - {max(scale.size, shift.size, factor.size, offset.size)}
        ):
            return None, f"{where} has a constant of another size"
        shift = shift + scale * offset
        scale = scale * factor
    return None, f"the outputs come straight from {tensor!r}"


def _layer(graph: Graph, node: onnx.NodeProto) -> tuple[str, F64, F64] | None:
    """φ, W (C×D) and b of a MatMul or Gemm with a constant second operand."""
    raw = graph.constant(node.input[1])
    if raw is None or raw.ndim > 2 or (raw.ndim == 1 and node.op_type == "Gemm"):
        return None
    weight = raw.astype(np.float64).reshape(raw.shape[0], -1)  # D×C
    bias = np.zeros(1)
    if node.op_type == "Gemm":
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if given.get("transA", 0):
            return None  # features with the batch last
        weight = (weight.T if given.get("transB", 0) else weight) * given.get("alpha", 1.0)
        if len(node.input) > 2 and node.input[2]:
            term = graph.constant(node.input[2])
            if term is None or (term.ndim == 2 and term.shape[0] != 1):
                return None
            bias = term.astype(np.float64).ravel() * given.get("beta", 1.0)
    return node.input[0], np.ascontiguousarray(weight.T), bias


def _affine(graph: Graph, node: onnx.NodeProto) -> tuple[str, Array, Array] | None:
    """(x, a, b) of a node that is a·x + b with constant a and b; None for any other node."""
    if node.op_type not in {"Add", "Sub", "Mul", "Div"} or node.domain not in ("", "ai.onnx"):
        return None
    left, right = (graph.constant(i) for i in node.input)
    if (left is None) == (right is None):
        return None
    constant = left if left is not None else right
    assert constant is not None
    x = node.input[1 if left is not None else 0]
    c = constant.astype(np.float64).ravel()
    if constant.ndim > 1 and constant.shape[-1] != constant.size:
        return None
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Add":
        return x, one, c
    if node.op_type == "Sub":
        return (x, one, -c) if right is not None else (x, -one, c)
    if node.op_type == "Mul":
        return x, c, zero
    return (x, 1 / c, zero) if right is not None and (c != 0).all() else None


def _decomposed(graph: Graph, node: onnx.NodeProto) -> tuple[Step, str] | None:
    """Softmax or log-softmax written out: exp(z − max) / Σ exp(z − max), z − log Σ exp z."""
    if node.op_type == "Div":
        top = graph.makers.get(node.input[0])
        if top is None or top.op_type != "Exp":
            return None
        if not _leads(graph, node.input[1], lambda n: _is(n, "ReduceSum", node.input[0])):
            return None
        return "softmax", _unshifted(graph, top.input[0])
    if node.op_type == "Sub":
        x = node.input[0]

        def normaliser(n: onnx.NodeProto) -> bool:
            if _is(n, "ReduceLogSumExp", x):
                return True
            total = graph.makers.get(n.input[0]) if n.op_type == "Log" else None
            exp = graph.makers.get(total.input[0]) if total is not None else None
            return (
                total is not None
                and exp is not None
                and total.op_type == "ReduceSum"
                and _is(exp, "Exp", x)
            )

        if _leads(graph, node.input[1], normaliser):
            return "log_softmax", _unshifted(graph, x)
    return None


def _unshifted(graph: Graph, name: str) -> str:
    """z where ``name`` is z − max(z); else ``name``."""
    node = graph.makers.get(name)
    if node is not None and node.op_type == "Sub":
        z = str(node.input[0])
        if _leads(graph, node.input[1], lambda n: _is(n, "ReduceMax", z)):
            return z
    return name


def _is(node: onnx.NodeProto, kind: str, source: str) -> bool:
    return bool(node.op_type == kind and node.input[0] == source)


def _leads(graph: Graph, name: str, test: Callable[[onnx.NodeProto], bool]) -> bool:
    """Whether a node that passes ``test`` feeds ``name`` through broadcasts and constant bounds."""
    for _ in range(_DEPTH):
        node = graph.makers.get(name)
        if node is None:
            return False
        if test(node):
            return True
        if node.op_type in _SHAPES | {"Expand"}:
            name = node.input[0]
        elif node.op_type in {"Max", "Min", "Add", "Clip"}:
            free = [i for i in node.input if i and graph.constant(i) is None]
            if len(free) != 1:
                return False
            name = free[0]
        else:
            return False
    return False
