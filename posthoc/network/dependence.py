"""What the tensors of a graph depend on: rows, sizes of rows only, or neither."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx

from posthoc.model.renaming import subgraphs

CONSTANT, SIZES, ROWS = range(3)
_SIZES = ("Shape", "Size")
STANDARD = ("", "ai.onnx")


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node needs: inputs, and what the graphs inside it take from outside."""
    names = [n for n in node.input if n]
    for graph in subgraphs(node):
        names += captured(graph)
    return list(dict.fromkeys(names))


def captured(graph: onnx.GraphProto) -> list[str]:
    """The tensors that a graph inside a node takes from outside."""
    own = {v.name for v in (*graph.input, *graph.initializer)}
    own.update(s.values.name for s in graph.sparse_initializer)
    own.update(o for node in graph.node for o in node.output)
    used = [n for node in graph.node for n in reads(node)]
    used += [o.name for o in graph.output]  # a branch may hand on a tensor from outside
    return [n for n in dict.fromkeys(used) if n not in own]


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Tensor -> the node that makes it."""
    return {o: node for node in graph.node for o in node.output if o}


def levels(graph: onnx.GraphProto) -> dict[str, int]:
    """CONSTANT, SIZES (of inputs, through Shape, never their values) or ROWS, by tensor."""
    constant = {v.name for v in graph.initializer}
    constant |= {s.values.name for s in graph.sparse_initializer}
    found = dict.fromkeys(constant, CONSTANT)
    found.update((v.name, ROWS) for v in graph.input if v.name not in constant)
    for node in graph.node:
        standard = node.domain in STANDARD
        # The second input of CastLike gives a type, not a value.
        needed = node.input[:1] if standard and node.op_type == "CastLike" else reads(node)
        level = max((found[n] for n in needed), default=CONSTANT)
        if standard and node.op_type in _SIZES:
            level = min(level, SIZES)
        found.update((o, level) for o in node.output if o)
    return found


def behind(nodes: Iterable[onnx.NodeProto], sources: Collection[str]) -> set[str]:
    """The tensors that nodes, in order, make of ``sources``; not these themselves, unless one
    is made of another."""
    found: set[str] = set()
    for node in nodes:
        if any(n in found or n in sources for n in reads(node)):
            found.update(o for o in node.output if o)
    return found


def before(nodes: Sequence[onnx.NodeProto], target: str) -> set[str]:
    """The tensors that ``target`` is made of, and itself."""
    found = {target}
    for node in reversed(nodes):
        if found.intersection(node.output):
            found.update(reads(node))
    return found
