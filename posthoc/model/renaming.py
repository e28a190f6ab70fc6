"""Names of tensors in an ONNX graph: listed, and changed everywhere at once."""

from __future__ import annotations

from collections.abc import Mapping

import onnx


def tensor_names(graph: onnx.GraphProto) -> set[str]:
    """Every tensor name of a graph, those of the graphs inside its nodes too."""
    names = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    names.update(s.values.name for s in graph.sparse_initializer)
    for node in graph.node:
        names.update(node.input)
        names.update(node.output)
        for inner in subgraphs(node):
            names |= tensor_names(inner)
    return names - {""}


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node (the branches of If, the bodies of Loop and Scan)."""
    return [g for a in node.attribute for g in (a.g, *a.graphs) if g.node or g.output]


def rename_tensors(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give the tensors that are keys of ``names`` their new names, in place.

    No name may mean one tensor outside and another inside a node's graph; ONNX forbids that.
    """
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for value in (*values, *(s.values for s in graph.sparse_initializer)):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for slots in (node.input, node.output):
            slots[:] = [names.get(n, n) for n in slots]
        for inner in subgraphs(node):
            rename_tensors(inner, names)


def free_name(name: str, taken: set[str], prefix: str) -> str:
    """``name`` behind as many prefixes as it takes to be nobody else's."""
    while name in taken:
        name = prefix + name
    return name
