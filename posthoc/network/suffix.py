"""The part of a graph behind its sites, written once more for S·N rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from posthoc.contract import Array, ModelError
from posthoc.graph import Fragment
from posthoc.model.files import opset_of
from posthoc.model.renaming import rename_tensors, subgraphs, tensor_names
from posthoc.network.batch import Layout, Layouts
from posthoc.network.dependence import (
    CONSTANT,
    ROWS,
    SIZES,
    STANDARD,
    before,
    behind,
    levels,
    producers,
    reads,
)

# Act on each element, so that samples may be an axis of their own while rows are shared.
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu"})
_END = np.iinfo(np.int64).max
Terms = Mapping[str, Array]  # gain and offset, those that there are: S×…, against a row


class Suffix:
    """Writes what lies behind the sites on S·N rows into ``new``, all rows of sample 0 first.

    Every node behind a site is copied as it is. That is right where all it reads is what it would
    be on S·N rows, so rows of the prefix are repeated, and sizes taken from them multiplied.
    ``again`` is how many nodes are computed again, on N rows, before the suffix takes a tensor of
    the frozen graph: a host fuses nodes only while nobody else reads what is between them, and
    rounds otherwise where it does not. Raises ModelError as `posthoc.network.fold.sampled` does.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        output: str,
        noises: Mapping[str, Terms],
        samples: int,
        prefix: str,
        inputs: bool,
        layouts: Layouts,
        again: int,
    ):
        self.new = Fragment(opset_of(proto), prefix)
        self._prefix, self._samples, self._inputs = prefix, samples, inputs
        self._graph, self._output, self._noises = proto.graph, output, noises
        self._layouts, self._depth = layouts, again
        self._readers = Counter(i for n in proto.graph.node for i in reads(n))
        self._readers.update(o.name for o in proto.graph.output)
        self._twins: dict[str, str] = {}
        self._levels = levels(proto.graph)
        self._makers = producers(proto.graph)
        self._folded: dict[str, str] = {}
        needed = before(proto.graph.node, output)
        for name in noises:
            if name not in needed:
                raise ModelError(f"output {output!r} does not depend on {name!r}")
        self._suffix = behind(proto.graph.node, noises) & needed
        self._nodes = [n for n in proto.graph.node if self._suffix.intersection(n.output)]
        self._used = {i for n in self._nodes for i in reads(n)} | {output}
        beside = [i for n in self._nodes if self._shares(n) for i in (*n.input, *n.output)]
        asked = {n for n in self._used - self._suffix if self._levels[n] != CONSTANT}
        for node in reversed(proto.graph.node):  # and the sizes that these are made of
            if any(self._levels.get(o) == SIZES and o in asked for o in node.output):
                asked.update(i for i in reads(node) if self._levels[i] != CONSTANT)
        layouts.look([output, *noises, *beside, *sorted(asked)])

    def members(self, name: str, axis: int) -> onnx.ValueInfoProto:
        """Write everything up to the tensor ``name``, and say what it holds."""
        for site in self._noises:
            if site not in self._suffix:
                self._folded[site] = self._noised(site, None)
        for node in self._nodes:
            self._copy(node)
            for out in node.output:
                if out in self._noises:
                    self._folded[out] = self._noised(out, self._folded[out])
        layout = self._rows_of(self._output)
        rank = len(layout.dims)
        if layout.batch != 0 or not (rank == 1 or 1 <= axis % rank < rank):
            raise ModelError(
                f"output {self._output!r} has shape {layout.dims}, rows in axis {layout.batch}; "
                f"members need rows in axis 0 and classes in another (axis={axis})"
            )
        x, a = self._split(self._folded[self._output], layout), axis % rank if rank > 1 else 1
        # [S, N, …, C, …] → [N, …, S, C, …] → [N, …, S·C, …]
        moved = [1, *range(2, a + 1), 0, *range(a + 1, rank + 1)]
        x = self.new.op("Transpose", x, perm=moved)
        if rank == 1:
            self.new.publish(x, name)
            dims: list[int] = [-1, self._samples]
        else:
            sizes = self.new.op("Shape", x)
            shape = self.new.op(
                "Concat",
                self._part(sizes, 0, a),
                self.new.const([-1], "int64"),
                self._part(sizes, a + 2, _END),
                axis=0,
            )
            self.new.op("Reshape", x, shape, out=name)
            dims = list(layout.dims)
            dims[a] *= self._samples if dims[a] > 0 else 1
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(layout.dtype))
        shown = ["N", *(d if d > 0 else None for d in dims[1:])]
        return helper.make_tensor_value_info(name, kind, shown)

    def _copy(self, node: onnx.NodeProto) -> None:
        """The node on S·N rows."""
        mask = any(o and (o in self._used) for o in node.output[1:])
        if node.op_type == "Dropout" and node.domain in STANDARD and not mask:
            # One that was left in training mode would draw masks of its own.
            self._folded[node.output[0]] = self._like(node.input[0])
            return
        shared = self._shared(node) if self._shares(node) else None
        if shared is not None:
            self._folded[node.output[0]] = shared
            return
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{self._prefix}{node.name}" if node.name else ""
        copy.input[:] = [self._like(i) for i in node.input]
        copy.output[:] = [f"{self._prefix}{o}" if o else "" for o in node.output]
        for graph in subgraphs(copy):
            outside = {n: self._like(n) for n in reads(node) if n in self._levels}
            inside = {n: f"{self._prefix}{n}" for n in tensor_names(graph) if n not in outside}
            rename_tensors(graph, {**inside, **outside})
        self.new.nodes.append(copy)
        self._folded.update((o, f"{self._prefix}{o}") for o in node.output if o)

    def _shares(self, node: onnx.NodeProto) -> bool:
        """Whether it is an elementwise node of one tensor that has samples and one that has not."""
        if node.op_type not in _ELEMENTWISE or node.domain not in STANDARD or len(node.input) != 2:
            return False
        own = [n in self._suffix or n in self._noises for n in node.input]
        return sum(own) == 1 and all(self._levels[n] != CONSTANT for n in node.input)

    def _shared(self, node: onnx.NodeProto) -> str | None:
        """Such a node's result, from rows that are not repeated for each sample; None where they
        have to be."""
        layouts = [x for n in (*node.input, *node.output) if (x := self._layouts[n]) is not None]
        if any(x.batch != 0 for x in layouts) or len({len(x.dims) for x in layouts}) != 1:
            return None
        shared = [n not in self._suffix and n not in self._noises for n in node.input]
        if len(layouts) < 3 or node.input[shared.index(True)] in self._folded:
            return None  # repeated already
        operands = [
            self._twin(n, self._depth) if s else self._split(self._like(n), layout)
            for n, layout, s in zip(node.input, layouts, shared, strict=False)
        ]
        return self._merge(self.new.op(node.op_type, *operands), layouts[2])

    def _like(self, name: str) -> str:
        """``name`` as it would be on S·N rows: of the suffix, repeated, or the tensor itself."""
        if name in self._folded or not name:
            return self._folded.get(name, "")
        level = self._levels[name]
        if level == CONSTANT:
            return name
        layout = self._layouts[name]
        if layout is not None and (layout.constant or (layout.fixed and level == ROWS)):
            self._folded[name] = name
        elif layout is not None and level == ROWS and layout.batch is not None:
            times = [self._samples if i == layout.batch else 1 for i in range(len(layout.dims))]
            x = self._twin(name, self._depth)
            self._folded[name] = self.new.op("Tile", x, self.new.const(times, "int64"))
        elif name not in self._makers:
            raise ModelError(
                f"input {name!r} does not hold its rows in one axis, so samples cannot be beside "
                "them; export the model with its batch in axis 0 of every input"
            )
        else:
            self._again(self._makers[name])
        return self._folded[name]

    def _again(self, node: onnx.NodeProto) -> None:
        """A node of the prefix that S·N rows give another result: sizes, and reshaped rows."""
        source = node.input[0] if node.input else ""
        sizes = node.op_type in ("Shape", "Size") and node.domain in STANDARD
        layout = self._layouts[source] if sizes else None
        if layout is None or layout.batch is None:
            self._copy(node)
            return
        own = self.new.op(node.op_type, source, **_attributes(node))
        times = [self._samples if i == layout.batch else 1 for i in range(len(layout.dims))]
        if node.op_type == "Size":
            factor = self.new.const(self._samples, "int64")
        else:
            ends = {k: v for k, v in _attributes(node).items() if k in ("start", "end")}
            factor = self.new.const(times[ends.get("start", 0) : ends.get("end")], "int64")
        self._folded[node.output[0]] = self.new.op("Mul", own, factor)

    def _twin(self, name: str, depth: int) -> str:
        """``name``, or its like made by nodes of its own where only one node reads it."""
        if name in self._twins:
            return self._twins[name]
        if self._depth == 0:
            return name
        node, layout = self._makers.get(name), self._layouts[name]
        if node is None or layout is None or layout.batch != 0 or self._levels[name] != ROWS:
            return name
        if depth == 0 or self._readers[name] > 1:
            # Not read as it is, because a host joins nodes that do the same to the same.
            self._twins[name] = self._merge(self.new.unsqueeze(name, 0), layout)
            return self._twins[name]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{self._prefix}again/{node.name}" if node.name else ""
        copy.input[:] = [self._twin(i, depth - 1) if i else "" for i in node.input]
        copy.output[:] = [f"{self._prefix}again/{o}" if o else "" for o in node.output]
        self.new.nodes.append(copy)
        self._twins.update((o, f"{self._prefix}again/{o}") for o in node.output if o)
        return self._twins[name]

    def _noised(self, site: str, folded: str | None) -> str:
        """The site's tensor on S·N rows: g·h + c, from h on N rows where ``folded`` is None."""
        terms = self._noises[site]
        if not terms:
            return folded if folded is not None else self._like(site)
        layout = self._rows_of(site)
        batch, rank = layout.batch or 0, len(layout.dims)
        front = [batch, *(i for i in range(rank) if i != batch)]
        x = folded
        if x is None:
            maker = self._makers.get(site)
            # Not the result of a Dropout, which draws a mask where it is in training mode.
            x = maker.input[0] if maker is not None and maker.op_type == "Dropout" else site
            x = self._twin(x, self._depth)
        if batch:
            x = self.new.op("Transpose", x, perm=front)
        moved = Layout((-1, *layout.row), layout.dtype, 0, False, False)
        x = self.new.unsqueeze(x, 0) if folded is None else self._split(x, moved)
        for kind, term in terms.items():
            if not _broadcasts(term.shape[1:], layout.row):
                raise ModelError(
                    f"{kind} at {site!r} has shape {term.shape}; a row of it is {layout.row}"
                )
            name = f"{site}/{kind}"
            if self._inputs:
                given = self.new.input(name, layout.dtype, term.shape)
                value = self.new.unsqueeze(given, 1)
            else:
                value = self.new.const(term[:, None], layout.dtype)
            x = self.new.op("Mul" if kind == "gain" else "Add", x, value)
        x = self._merge(x, moved)
        if batch:
            x = self.new.op("Transpose", x, perm=[int(i) for i in np.argsort(front)])
        return x

    def _rows_of(self, name: str) -> Layout:
        layout = self._layouts[name]
        if layout is None or layout.batch is None or not layout.dtype.startswith("float"):
            what = "not a tensor" if layout is None else f"{layout.dtype} {layout.dims}"
            raise ModelError(
                f"tensor {name!r} ({what}) does not hold floats with the rows in one axis, one "
                "behind the other; choose a tensor before or behind it"
            )
        return layout

    def _split(self, x: str, layout: Layout) -> str:
        """[S·N, …] as [S, N, …]; without a copy."""
        return self._reshaped(x, [self._samples, -1], layout, 1)

    def _merge(self, x: str, layout: Layout) -> str:
        """[S, N, …] as [S·N, …]."""
        return self._reshaped(x, [-1], layout, 2)

    def _reshaped(self, x: str, first: list[int], layout: Layout, taken: int) -> str:
        if -1 not in layout.dims[1:]:
            return self.new.op("Reshape", x, self.new.const([*first, *layout.dims[1:]], "int64"))
        rest = self._part(self.new.op("Shape", x), taken, _END)
        shape = self.new.op("Concat", self.new.const(first, "int64"), rest, axis=0)
        return self.new.op("Reshape", x, shape)

    def _part(self, sizes: str, start: int, end: int) -> str:
        return self.new.op(
            "Slice", sizes, self.new.const([start], "int64"), self.new.const([end], "int64")
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _broadcasts(term: tuple[int, ...], row: tuple[int, ...]) -> bool:
    return len(term) == len(row) and all(
        t in (1, r) or r == -1 for t, r in zip(term, row, strict=True)
    )
