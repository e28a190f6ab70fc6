"""An ONNX model as a flat list of nodes and stored tensors.

Functions are written out: those of the model, and those by which ONNX itself defines an operator
that has no translation (Attention, for one). So is an If whose condition depends on no input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper
from torch import Tensor

from posthoc.contract import ModelError
from posthoc.model.files import OLDEST_OPSET, inlined, opset_of
from posthoc.network.autograd.dtypes import readable, tensor
from posthoc.network.autograd.node import Node
from posthoc.network.autograd.operators import OPERATORS

_STANDARD = ("", "ai.onnx")
# Not every operator that ONNX defines by a function: the inliner forgets the defaults of attributes
# (MeanVarianceNormalization), except where the function is made for the node, as for these.
_FUNCTIONS = {"Attention", "RotaryEmbedding"}
_VALUES = ("value", "value_float", "value_floats", "value_int", "value_ints")
_TYPES: dict[str, type] = {"f": np.float32, "i": np.int64}


@dataclass(slots=True)
class Reading:
    """``nodes`` in the order of the graph, ``stored`` tensors and ``inputs`` by name."""

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)
    stored: dict[str, TensorProto] = field(default_factory=dict)

    def needed(self, names: Iterable[str]) -> list[Node]:
        """The nodes that ``names`` depend on, in order."""
        wanted, found = set(names), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                wanted.update(i for i in node.inputs if i)
                found.append(node)
        return found[::-1]

    def store(self, name: str, value: TensorProto) -> None:
        """Keep a stored tensor; one of a type that is not read becomes a node without a
        translation."""
        if readable(value):
            self.stored[name] = value
        else:
            self.nodes.append(Node("Constant", name, (), (name,), {}, self.opset))


def refused(nodes: Iterable[Node]) -> list[tuple[str, str]]:
    """(operator, node) of those that have no translation."""
    return [
        (node.kind, node.name)
        for node in nodes
        if node.kind not in OPERATORS or OPERATORS[node.kind].refuses(node)
    ]


def apply(node: Node, arguments: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of one node."""
    made = OPERATORS[node.kind].run(node, *arguments)
    return (made,) if isinstance(made, Tensor) else tuple(made)


def read(model: bytes | onnx.ModelProto) -> Reading:
    """Raises ModelError for bytes that are no model and for an opset below 13."""
    if isinstance(model, bytes):
        try:
            model = onnx.load_from_string(model)
        except Exception as e:  # protobuf raises an error of its own
            raise ModelError(f"not an ONNX model: {e}") from e
    model = _written_out(inlined(model))
    if opset_of(model) < OLDEST_OPSET:
        raise ModelError(
            f"opset {opset_of(model)} is too old; convert the model to {OLDEST_OPSET} or newer"
        )
    graph = model.graph
    reading = Reading(
        opset_of(model), tuple(v.name for v in graph.input), tuple(v.name for v in graph.output)
    )
    _add(reading, graph, {}, "")
    return reading


def _written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    kinds = {n.op_type for n in model.graph.node if n.domain in _STANDARD}
    chosen = [(domain, kind) for kind in sorted(kinds & _FUNCTIONS) for domain in _STANDARD]
    if not chosen:
        return model
    try:
        return inliner.inline_selected_functions(model, chosen, inline_schema_functions=True)
    except RuntimeError:  # types that cannot be inferred: the operator stays, and is refused
        return model


def _add(reading: Reading, graph: onnx.GraphProto, scope: Mapping[str, str], prefix: str) -> None:
    """Add the nodes of ``graph``, a branch of an If where there is a ``prefix``: its names get
    the prefix, and ``scope`` says how the names around it read."""
    names = dict(scope)
    made = [o for n in graph.node for o in n.output if o]
    made += [t.name for t in graph.initializer]
    made += [s.values.name for s in graph.sparse_initializer]
    if prefix:
        names.update((name, f"{prefix}{name}") for name in made)
    for stored in graph.initializer:
        reading.store(names.get(stored.name, stored.name), stored)
    for sparse in graph.sparse_initializer:
        name = names.get(sparse.values.name, sparse.values.name)
        reading.nodes.append(Node("Constant", name, (), (name,), {}, reading.opset))
    for proto in graph.node:
        node = _node(proto, names, reading.opset)
        branch = _branch(reading, proto, node) if node.kind == "If" else None
        value = _value(node) if node.kind == "Constant" else None
        if value is not None:
            reading.store(node.outputs[0], value)
        elif branch is not None:
            inner = f"{prefix}{node.outputs[0]}/"
            _add(reading, branch, names, inner)
            for source, out in zip(branch.output, node.outputs, strict=True):
                local = source.name in {o for n in branch.node for o in n.output} or any(
                    source.name == t.name for t in branch.initializer
                )
                name = f"{inner}{source.name}" if local else names.get(source.name, source.name)
                reading.nodes.append(Node("Identity", out, (name,), (out,), {}, reading.opset))
        else:
            reading.nodes.append(node)


def _node(proto: onnx.NodeProto, names: Mapping[str, str], opset: int) -> Node:
    kind = proto.op_type if proto.domain in _STANDARD else f"{proto.domain}.{proto.op_type}"
    inputs = tuple(names.get(i, i) for i in proto.input)
    outputs = tuple(names.get(o, o) for o in proto.output)
    attributes = {
        a.name: _plain(helper.get_attribute_value(a))
        for a in proto.attribute
        if a.type not in (a.GRAPH, a.GRAPHS)
    }
    return Node(kind, proto.name or next(filter(None, outputs)), inputs, outputs, attributes, opset)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _value(node: Node) -> TensorProto | None:
    """What a Constant holds; None for text and for sparse tensors."""
    [name] = node.attributes if len(node.attributes) == 1 else [""]
    if name not in _VALUES:
        return None
    value = node.attributes[name]
    if isinstance(value, TensorProto):
        return value
    return numpy_helper.from_array(np.asarray(value, _TYPES[name.removeprefix("value_")[0]]))


def _branch(reading: Reading, proto: onnx.NodeProto, node: Node) -> onnx.GraphProto | None:
    """The branch that an If always takes; None where that hangs on an input."""
    nodes = reading.needed([node.inputs[0]])
    made = {o for n in nodes for o in n.outputs}
    leaves = {i for n in nodes for i in n.inputs if i and i not in made} | {node.inputs[0]} - made
    if refused(nodes) or any(i in reading.inputs or i not in reading.stored for i in leaves):
        return None
    values = {name: tensor(reading.stored[name]) for name in leaves}
    for n in nodes:
        results = apply(n, [values[i] if i else None for i in n.inputs])
        values.update((o, r) for o, r in zip(n.outputs, results, strict=False) if o)
    side = "then_branch" if bool(values[node.inputs[0]].item()) else "else_branch"
    branches: dict[str, onnx.GraphProto] = {a.name: a.g for a in proto.attribute}
    return branches[side]
