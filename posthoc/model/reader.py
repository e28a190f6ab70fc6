"""Reads an ONNX graph: who makes a tensor, and which tensors are constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import onnx
from onnx import helper, numpy_helper

from posthoc.contract import Array
from posthoc.model.quantised import as_float
from posthoc.runtime import open_session

# Operators that leave the values alone, or only move them about.
SHAPES = frozenset(
    {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout", "Transpose"}
)
_FOLDED = SHAPES | {"Concat", "Mul", "Add", "Sub", "Div", "DequantizeLinear"}
_STANDARD = ("", "ai.onnx")
_IR = 8  # old enough for any opset that is walked
_DEPTH = 64  # of constant expressions


class Graph:
    """The top level of a model, quantised operators read as float ones (`posthoc.model.quantised`).

    ``makers`` maps a tensor to the node that makes it in this reading.
    """

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.makers: dict[str, onnx.NodeProto] = {}
        graph = model.graph
        self._real = {v.name for v in (*graph.input, *graph.initializer)}
        for node in graph.node:
            self._real.update(node.output)
            for seen in as_float(node):
                self.makers.update((out, seen) for out in seen.output if out)
        self._values = {t.name: t for t in graph.initializer}
        self._known: dict[str, Array | None] = {}

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes ``name`` where it is a standard operator of one of ``kinds``."""
        node = self.makers.get(name)
        found = node is not None and node.op_type in kinds and node.domain in _STANDARD
        return node if found else None

    def define(self, node: onnx.NodeProto) -> None:
        """A further node of this reading, which the model does not have."""
        self.makers.update((out, node) for out in node.output)

    def needed(self, names: Iterable[str]) -> list[onnx.NodeProto]:
        """Nodes to add to the model, in order, so that it has ``names`` too."""
        nodes: list[onnx.NodeProto] = []
        made = set(self._real)

        def add(name: str) -> None:
            node = self.makers.get(name)
            if name in made or node is None:
                return
            made.update(node.output)
            for source in node.input:
                add(source)
            nodes.append(node)

        for name in names:
            add(name)
        return nodes

    def constant(self, name: str, depth: int = _DEPTH) -> Array | None:
        """Value of a tensor that does not depend on the inputs; None for one that does."""
        if name not in self._known:
            self._known[name] = self._evaluate(name, depth)
        return self._known[name]

    def _evaluate(self, name: str, depth: int) -> Array | None:
        if name in self._values:
            return np.asarray(numpy_helper.to_array(self._values[name]))
        node = self.makers.get(name)
        if node is None or depth == 0 or node.domain not in _STANDARD:
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
