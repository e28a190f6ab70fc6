"""Walks an ONNX graph back from an output to the outputs z and the last linear layer.

Everything here reads the graph only; `posthoc.frozen` checks what was found by running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx

from posthoc.contract import ModelError
from posthoc.model.linear import Found, find_linear, passes_on, requantised
from posthoc.model.quantised import Rounding
from posthoc.model.reader import SHAPES, Graph

Link = Literal["softmax", "log_softmax", "sigmoid", "log", "argmax"]
Step = Link | Rounding

_LINKS: Mapping[str, Link] = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "Log": "log",
    "ArgMax": "argmax",
}
_DEPTH = 64  # of the walk through what normalises a softmax


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


def walk(graph: Graph, output: str, *, links: bool) -> Walk:
    """Back from ``output`` through shape operators and, with ``links``, softmax, sigmoid and
    argmax to z, and to the last linear layer behind z.

    A quantisation on the way is passed where a link lies behind it. One right behind the layer
    belongs to z, because the link saw the rounded values.
    """
    passed: list[tuple[tuple[str, ...], Step | None, str]] = []
    tensor = output
    while (node := graph.makers.get(tensor)) is not None:
        kinds: tuple[str, ...] = (node.op_type,)
        source = node.input[0] if node.input else ""
        step: Step | None = None
        if node.op_type in SHAPES:
            pass
        elif links and node.op_type in _LINKS:
            step = _LINKS[node.op_type]
        elif links and (inner := _decomposed(graph, node)) is not None:
            step, source = inner
            kinds = ("Softmax",) if step == "softmax" else ("LogSoftmax",)
        elif links and (rounded := requantised(graph, tensor)) is not None:
            step, source = rounded
            kinds = ("DequantizeLinear", "QuantizeLinear")
        else:
            break
        if source not in graph.makers:
            break
        passed.append((kinds, step, source))
        tensor = source
    last = max((i for i, p in enumerate(passed) if isinstance(p[1], str)), default=-1)
    ends = (i for i, p in enumerate(passed) if i > last and p[1] is not None)
    passed = passed[: next(ends, len(passed))]
    path = [output, *(p[2] for p in passed)][last + 1 :]
    found, stop = find_linear(graph, path[-1])
    steps = tuple(p[1] for p in reversed(passed) if p[1] is not None)
    return Walk(tuple(path), steps, tuple(k for p in passed for k in p[0]), found, stop)


def walks_from(graph: Graph, head: str, output: str) -> list[Walk]:
    """Every way that ``output`` may follow from the layer ``head`` (a node, or its result).

    z is the layer's result, or what shape operators, quantisation and constants added or
    multiplied make of it; the output is z or a function of it. Which one is for the caller to
    check. Raises ModelError when there is no such linear layer.
    """
    nodes = graph.model.graph.node
    node = next((n for n in nodes if head == n.name or head in n.output), None)
    if node is None:
        raise ModelError(f"the model has no node {head!r}")
    tensors = [str(node.output[0])]
    for after in list(graph.makers.values()):
        if passes_on(graph, after, tensors[-1]):
            tensors.append(after.output[0])
    layers = {t: find_linear(graph, t) for t in reversed(tensors)}
    if not any(found for found, _ in layers.values()):
        raise ModelError(f"{head!r} is not a linear layer: {layers[tensors[0]][1]}")
    ways: list[tuple[tuple[Step, ...], tuple[str, ...]]] = [((), ())]
    ways += [((step,), (kind,)) for kind, step in _LINKS.items() if step != "log"]
    if (rounded := requantised(graph, output)) is not None:
        kinds = ("DequantizeLinear", "QuantizeLinear")
        ways += [((*steps, rounded[0]), (*kinds, *tail)) for steps, tail in ways if steps]
    return [
        Walk((tensor,), steps, tail, found, stop)
        for tensor, (found, stop) in layers.items()
        for steps, tail in ways
        if found is not None
    ]


def _decomposed(graph: Graph, node: onnx.NodeProto) -> tuple[Link, str] | None:
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
        if node.op_type in SHAPES | {"Expand"}:
            name = node.input[0]
        elif node.op_type in {"Max", "Min", "Add", "Clip"}:
            free = [i for i in node.input if i and graph.constant(i) is None]
            if len(free) != 1:
                return False
            name = free[0]
        else:
            return False
    return False
