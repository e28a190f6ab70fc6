"""Recognises normalisations in a graph, whole nodes and those that an exporter took apart.

A normalisation is y = γ·u + β with u = (x − mean)/√(mean of squares + ε) or x/√(mean of squares
+ ε), γ and β constants along one axis. Taken apart, it is a product of the factors x or x − mean, a
constant γ, and an inverse root of a mean of squares of these, in any order and arrangement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from posthoc.contract import F64, Array
from posthoc.network.dependence import CONSTANT, STANDARD, levels, producers, reads
from posthoc.runtime import open_session

Kind = Literal["batch", "layer", "group", "instance", "rms"]

# Leave values alone, or repeat them.
_SAME = frozenset({"Cast", "CastLike", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_MEANS = frozenset({"GlobalAveragePool", "ReduceMean"})
_PASSING = 64  # nodes looked through at once


@dataclass(frozen=True, slots=True)
class Norm:
    """A tensor that holds γ·u + β. ``gamma`` and ``beta`` (C) run along ``axis``, which counts from
    the end where it is negative; ``groups`` marks a γ for each group of channels."""

    tensor: str
    kind: Kind
    axis: int
    gamma: F64
    beta: F64
    node: str
    variance_eps: tuple[F64, float] | None = None
    groups: int | None = None


def find(model: onnx.ModelProto) -> list[Norm]:
    """The normalisations of a graph, in topological order. γ of several axes and batch statistics
    (a BatchNormalization left in training mode) are not among them."""
    reader = Reader(model)
    found = [n for node in model.graph.node for n in (_whole(reader, node),) if n is not None]
    have = {n.tensor for n in found}
    for node in model.graph.node:
        apart = _apart(reader, node)
        if apart is not None and apart.tensor not in have:
            have.add(apart.tensor)
            found.append(apart)
    order = {o: i for i, node in enumerate(model.graph.node) for o in node.output}
    return sorted(found, key=lambda n: order[n.tensor])


class Reader:
    """Who makes and who reads a tensor, and what constants hold."""

    def __init__(self, model: onnx.ModelProto):
        self._model = model
        self._makers = producers(model.graph)
        self._levels = levels(model.graph)
        self._stored = {t.name: t for t in model.graph.initializer}
        self._values: dict[str, Array | None] = {}
        self.outputs = {o.name for o in model.graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            typed = node.op_type == "CastLike"  # which reads its second input's type only
            for name in node.input[:1] if typed else reads(node):
                self.readers.setdefault(name, []).append(node)

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The standard node of one of ``kinds`` that makes ``name``, its first result."""
        node = self._makers.get(name)
        found = node is not None and node.op_type in kinds and node.domain in STANDARD
        return node if found and node is not None and node.output[0] == name else None

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that is the same for all inputs."""
        if self._levels.get(name) != CONSTANT:
            return None
        if name not in self._values:
            self._values[name] = self._evaluated(name)
        return self._values[name]

    def _evaluated(self, name: str) -> Array | None:
        if name in self._stored:
            return np.asarray(numpy_helper.to_array(self._stored[name]))
        nodes: list[onnx.NodeProto] = []
        wanted = {name}
        for node in reversed(self._model.graph.node):
            if not wanted.intersection(node.output):
                continue
            if node.op_type == "CastLike":
                node = helper.make_node("Identity", node.input[:1], node.output)
            nodes.append(node)
            wanted.update(reads(node))
        graph = helper.make_graph(
            nodes[::-1],
            "constant",
            [],
            [onnx.ValueInfoProto(name=name)],
            [t for n, t in self._stored.items() if n in wanted],
        )
        copy = helper.make_model(
            graph, opset_imports=list(self._model.opset_import), ir_version=self._model.ir_version
        )
        try:
            return np.asarray(open_session(copy.SerializeToString()).run(None, {})[0])
        except Exception:  # a sparse or exotic constant, or two types without their CastLike
            return None

    def plain(self, name: str) -> str:
        """What ``name`` is a copy, another type or another shape of."""
        while (node := self.maker(name, *_SAME)) is not None:
            name = node.input[0]
        return name

    def same(self, a: str, b: str, depth: int = 4) -> bool:
        """Whether two tensors are one, or made in one way of one."""
        a, b = self.plain(a), self.plain(b)
        if a == b:
            return True
        one, two = self._makers.get(a), self._makers.get(b)
        if one is None or two is None or depth == 0 or one.op_type != two.op_type:
            return False
        return (
            len(one.input) == len(two.input)
            and [a.SerializeToString() for a in one.attribute]
            == [a.SerializeToString() for a in two.attribute]
            and all(self.same(i, j, depth - 1) for i, j in zip(one.input, two.input, strict=True))
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _vector(value: Array | None) -> tuple[F64, int] | None:
    """C numbers along one axis, and that axis from the end; None for a scalar, or several axes."""
    if value is None or value.dtype.kind not in "fiu" or value.ndim == 0:
        return None
    wide = [i for i, d in enumerate(value.shape) if d != 1]
    if len(wide) != 1:
        return None
    return value.astype(np.float64).ravel(), wide[0] - value.ndim


def _whole(r: Reader, node: onnx.NodeProto) -> Norm | None:
    """A normalisation that is one node."""
    given, kind = _attributes(node), node.op_type
    name = node.name or node.output[0] if node.output else ""
    inputs = [r.constant(i) for i in node.input]
    inputs += [None] * (5 - len(inputs))

    def made(
        what: Kind, axis: int, gamma: Array | None, beta: Array | None, **more: Any
    ) -> Norm | None:
        if gamma is None:
            return None
        vector = (gamma.astype(np.float64).ravel(), 0) if gamma.ndim == 1 else _vector(gamma)
        if vector is None or (gamma.ndim > 1 and vector[1] != -1):
            return None
        shift = np.zeros_like(vector[0]) if beta is None else beta.astype(np.float64).ravel()
        if shift.shape != vector[0].shape:
            return None
        return Norm(node.output[0], what, axis, vector[0], shift, name, **more)

    if node.domain in STANDARD and kind == "BatchNormalization":
        _, gamma, beta, _, variance = inputs[:5]
        if given.get("training_mode", 0) or variance is None or beta is None:
            return None
        pair = variance.astype(np.float64), float(given.get("epsilon", 1e-5))
        return made("batch", 1, gamma, beta, variance_eps=pair)
    if node.domain in STANDARD and kind == "InstanceNormalization":
        return None if _core(r, node.output[0]) else made("instance", 1, inputs[1], inputs[2])
    if node.domain in STANDARD and kind == "GroupNormalization":
        return made("group", 1, inputs[1], inputs[2], groups=given.get("num_groups"))
    if kind in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        rms = kind != "LayerNormalization"
        return made("rms" if rms else "layer", -1, inputs[1], None if rms else inputs[2])
    if node.domain == "com.microsoft" and kind == "SkipLayerNormalization":
        return made("layer", -1, inputs[2], inputs[3])
    if node.domain == "com.microsoft" and kind == "SkipSimplifiedLayerNormalization":
        return made("rms", -1, inputs[2], None)
    return None


def _core(r: Reader, tensor: str) -> bool:
    """Whether it is the middle of a group normalisation: Reshape, unit InstanceNormalization,
    Reshape."""
    node = r.maker(tensor, "InstanceNormalization")
    if node is None or r.maker(node.input[0], "Reshape") is None:
        return False
    scale, shift = r.constant(node.input[1]), r.constant(node.input[2])
    unit = scale is not None and shift is not None and (scale == 1).all() and (shift == 0).all()
    return bool(unit) and all(n.op_type == "Reshape" for n in r.readers.get(tensor, ()))


def _apart(r: Reader, node: onnx.NodeProto) -> Norm | None:
    """A normalisation whose last product is ``node``."""
    if node.op_type not in ("Mul", "Div") or node.domain not in STANDARD:
        return None
    product = _factors(r, node.output[0], set())
    # x may be a product itself.
    bases = {x for name, power in product if (x := _rooted(r, name, power)) is not None}
    if bases:
        product = _factors(r, node.output[0], bases)
    gammas, rest = [], []
    for name, power in product:
        value = r.constant(name)
        if value is None:
            rest.append((name, power))
        elif value.size > 1:
            gammas.append((_vector(value), power))
    if len(gammas) != 1 or gammas[0][0] is None or gammas[0][1] != 1:
        return None
    kind = _kind(r, rest)
    if kind is None:
        return None
    gamma, axis = gammas[0][0]
    tensor, beta = _shifted(r, node.output[0], len(gamma), axis)
    return Norm(tensor, kind, axis, gamma, beta, node.name or node.output[0])


def _factors(r: Reader, tensor: str, whole: set[str]) -> list[tuple[str, int]]:
    """The tensors that a product is of, with their powers, 1 or -1; those in ``whole`` uncut."""
    found, todo = [], [(tensor, 1)]
    for _ in range(_PASSING):
        if not todo:
            break
        name, power = todo.pop()
        name = name if r.constant(name) is not None else _unshaped(r, name)
        node = r.maker(name, "Mul", "Div", "Reciprocal")
        if node is None or name in whole or r.constant(name) is not None:
            found.append((name, power))
        elif node.op_type == "Reciprocal":
            todo.append((node.input[0], -power))
        else:
            second = power if node.op_type == "Mul" else -power
            todo += [(node.input[1], second), (node.input[0], power)]
    return found


def _unshaped(r: Reader, name: str) -> str:
    """``name`` without changes of type, and of shape where a group normalisation has them."""
    while (node := r.maker(name, *(_SAME - {"Reshape"}))) is not None:
        name = node.input[0]
    node = r.maker(name, "Reshape")
    if node is not None and (r.maker(node.input[0], "InstanceNormalization") is not None):
        return str(node.input[0])
    return name


def _kind(r: Reader, factors: list[tuple[str, int]]) -> Kind | None:
    """What is normalised by factors that are not constant: a value and an inverse root."""
    if len(factors) == 1:
        return "group" if factors[0][1] == 1 and _core(r, factors[0][0]) else None
    if len(factors) != 2:
        return None
    for (x, up), (root, down) in (factors, factors[::-1]):
        squares = _root(r, root, down)
        if up != 1 or squares is None:
            continue
        difference = r.maker(x, "Sub")
        centred = difference is not None and _mean_of(r, difference.input[1], difference.input[0])
        if _mean_square(r, squares, x) or (
            centred and difference is not None and _variance(r, squares, difference.input[0])
        ):
            return "layer" if centred else "rms"
    return None


def _root(r: Reader, name: str, power: int) -> str | None:
    """m of a factor √(m + ε) with power -1, √m + ε with power -1, or (m + ε)^-½ with power 1."""
    name = _beside(r, name)
    node = r.maker(name, "Sqrt", "Pow")
    if node is None:
        return None
    exponent = 0.5 if node.op_type == "Sqrt" else _number(r, node.input[1])
    return _beside(r, node.input[0]) if exponent is not None and exponent * power == -0.5 else None


def _rooted(r: Reader, name: str, power: int) -> str | None:
    """x of a factor that is an inverse root of a mean of x²."""
    squares = _root(r, name, power)
    inner = None if squares is None else _averaged(r, squares)
    base = None if inner is None else _square(r, inner)
    return None if base is None else r.plain(base)


def _beside(r: Reader, name: str) -> str:
    """``name`` without a number added to it or a least value, and without changes of shape."""
    name = r.plain(name)
    while (node := r.maker(name, "Add", "Max", "Clip", "Relu", "Abs")) is not None:
        if node.op_type in ("Add", "Max"):
            inner = [i for i in node.input if _number(r, i) is None]
            if len(inner) != 1:
                break
            name = r.plain(inner[0])
        else:
            name = r.plain(node.input[0])
    return name


def _number(r: Reader, name: str) -> float | None:
    value = r.constant(name)
    return float(value.ravel()[0]) if value is not None and value.size == 1 else None


def _averaged(r: Reader, name: str) -> str | None:
    """x of a mean over some axes of x, also of a sum times a number."""
    name = r.plain(name)
    if (node := r.maker(name, *_MEANS)) is not None:
        return r.plain(node.input[0])
    if (node := r.maker(name, "Mul", "Div")) is not None:
        for one, other in (node.input, node.input[::-1]):
            total = r.maker(r.plain(one), "ReduceSum")
            if total is not None and _number(r, other) is not None:
                return r.plain(total.input[0])
    return None


def _mean_of(r: Reader, mean: str, x: str) -> bool:
    inner = _averaged(r, mean)
    return inner is not None and r.same(inner, x)


def _square(r: Reader, name: str) -> str | None:
    """x of x²."""
    node = r.maker(r.plain(name), "Mul", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return str(node.input[0]) if _number(r, node.input[1]) == 2 else None
    return str(node.input[0]) if r.same(*node.input) else None


def _mean_square(r: Reader, name: str, x: str) -> bool:
    """Whether ``name`` is the mean of x²."""
    inner = _averaged(r, name)
    base = None if inner is None else _square(r, inner)
    return base is not None and r.same(base, x)


def _variance(r: Reader, name: str, x: str) -> bool:
    """Whether ``name`` is the mean of x² less the square of the mean of x."""
    node = r.maker(r.plain(name), "Sub")
    if node is None:
        return False
    mean = _square(r, node.input[1])
    return mean is not None and _mean_of(r, mean, x) and _mean_square(r, node.input[0], x)


def _shifted(r: Reader, product: str, channels: int, axis: int) -> tuple[str, F64]:
    """The tensor with β added, and β; the product itself and zeros where none is."""
    tensor = product
    for _ in range(_PASSING):
        readers = r.readers.get(tensor, [])
        if len(readers) != 1 or tensor in r.outputs:
            break
        [node] = readers
        if node.domain in STANDARD and node.op_type in ("Cast", "CastLike", "Identity"):
            tensor = node.output[0]
            continue
        other = [i for i in node.input if i != tensor]
        if node.op_type == "Add" and node.domain in STANDARD and len(other) == 1:
            beta = _vector(r.constant(other[0]))
            if beta is not None and beta[1] == axis and len(beta[0]) == channels:
                return node.output[0], beta[0]
        break
    return product, np.zeros(channels)
