"""What a row takes inside a model: the tensors between its inputs and its outputs.

A file says nothing of it: samples of a network's first layer hold many times what a row has, and
the rows of a run are held all at once. So the model is run on one row and on two, with
every inner tensor as an output, and what the second row adds is followed from node to node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx

from posthoc.contract import Array
from posthoc.model.probe import with_outputs
from posthoc.runtime import open_session


def row_bytes(model: onnx.ModelProto, rows: Mapping[str, Array]) -> int | None:
    """The most bytes that a row adds to what a run holds at any time: inputs, and inner tensors
    from the node that makes them to the last one that reads them. ``rows``: inputs, of which the
    first row is taken. An estimate from above: ONNX Runtime joins nodes, and works in place.

    None where the model does not run so: on two rows, or with some inner value as an output.
    """
    inner = [name for node in model.graph.node for name in node.output if name]
    one = {name: value[:1] for name, value in rows.items()}
    two = {name: value.repeat(2, axis=0) for name, value in one.items()}
    try:
        session = open_session(with_outputs(model, inner))
        # Only sizes are kept: the tensors of both runs together would be the most that a fit holds.
        single, double = (list(map(_nbytes, session.run(inner, feed))) for feed in (one, two))
    except Exception:  # whatever a kernel raises; a graph that is too large for protobuf
        return None
    added = {name: max(0, b - a) for name, a, b in zip(inner, single, double, strict=True)}
    return sum(v.nbytes for v in one.values()) + _peak(model.graph, added)


def _peak(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> int:
    last: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        last |= dict.fromkeys((*node.output, *_read(node)), i)
    last |= {o.name: len(graph.node) for o in graph.output}
    held = peak = 0
    for i, node in enumerate(graph.node):
        held += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, held)
        gone = {name for name in (*node.output, *_read(node)) if last[name] == i}
        held -= sum(sizes.get(name, 0) for name in gone)
    return peak


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, and what the graphs inside of it read."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inside in graph.node:
                yield from _read(inside)


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, or of those of a sequence."""
    if isinstance(value, list):
        return sum(map(_nbytes, value))
    return int(getattr(value, "nbytes", 0))
