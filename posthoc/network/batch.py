"""Which axis of an inner tensor the rows are in, seen by running a model on n and on n-1 rows.

A graph does not say: rows are the first axis of an image, the second of a recurrent state, and
part of the first where tokens were flattened (N·T×C).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from posthoc.contract import Array, ModelError
from posthoc.model.probe import difference, first_that_runs, with_outputs
from posthoc.runtime import open_session, session_specs

_ROWS = 3
_SAME = 0.1  # relative; integer scales taken over a batch move rows by per cents
# Sizes that depend on values, so that a run does not show whether they are fixed.
_VALUES = frozenset({"Compress", "Loop", "NonMaxSuppression", "NonZero", "SequenceAt", "Unique"})


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's sizes, -1 where they are free, its numpy type, and the axis that the rows are in.

    ``batch`` is None where no size changes with the number of rows, or more than one does, or the
    rows are not one behind the other in that axis, each the same whatever is beside it; ``fixed``
    tells the first case from the others, and ``constant`` that the values did not change either.
    """

    dims: tuple[int, ...]
    dtype: str
    batch: int | None
    fixed: bool
    constant: bool

    @property
    def row(self) -> tuple[int, ...]:
        """The sizes without the axis of the rows."""
        return tuple(d for i, d in enumerate(self.dims) if i != self.batch)


class Layouts:
    """The layouts of a model's tensors, by name; each is looked at when it is asked for.

    ``rows`` are real rows by input, of which three are taken; without any, random ones are drawn.
    """

    def __init__(self, model: onnx.ModelProto, rows: Mapping[str, Array] | None = None):
        model = _still(model)
        self._model = model
        session = open_session(model.SerializeToString())
        self._inputs, _ = session_specs(session)
        given = first_that_runs(session, self._inputs, rows)[0]
        n = min(len(v) for v in given.values())
        taken = np.resize(np.arange(n), _ROWS)  # repeated where there are fewer
        self.rows = {s.name: given[s.name][taken] for s in self._inputs}
        kinds = {node.op_type for node in model.graph.node}
        free = any(d == -1 for s in self._inputs for d in s.shape[1:])
        self._static = not free and not kinds & _VALUES
        self._known: dict[str, Layout | None] = {}

    def __getitem__(self, name: str) -> Layout | None:
        """The layout of a tensor; None for what is not a tensor (a sequence)."""
        self.look([name])
        return self._known[name]

    def look(self, names: Iterable[str]) -> None:
        """Look at several tensors in one run."""
        names = [n for n in dict.fromkeys(names) if n not in self._known]
        if not names:
            return
        given = {s.name for s in self._inputs}
        inner = [n for n in names if n not in given]
        shapes = {s.name: s.shape for s in self._inputs}
        whole, fewer = dict(self.rows), {k: v[1:] for k, v in self.rows.items()}
        if inner:
            session = open_session(with_outputs(self._model, inner))
            for o in session.get_outputs():
                shapes[o.name] = tuple(d if isinstance(d, int) else -1 for d in o.shape or ())
            for rows in (whole, fewer):
                feed = {s.name: rows[s.name] for s in self._inputs}
                try:
                    found = session.run(inner, feed)
                except Exception as e:  # whatever a kernel raises
                    count = len(next(iter(feed.values())))
                    raise ModelError(f"the model does not run on {count} rows: {e}") from e
                rows.update(zip(inner, found, strict=True))
        for name in names:
            self._known[name] = self._layout(whole[name], fewer[name], shapes[name])

    def _layout(self, whole: Array, fewer: Array, inferred: tuple[int, ...]) -> Layout | None:
        if not (isinstance(whole, np.ndarray) and isinstance(fewer, np.ndarray)):
            return None
        batch, fixed = _batch(whole, fewer)
        if len(inferred) != whole.ndim:
            inferred = (-1,) * whole.ndim
        dims = tuple(
            -1 if i == batch or a != b else a if self._static or a == known else -1
            for i, (a, b, known) in enumerate(zip(whole.shape, fewer.shape, inferred, strict=True))
        )
        return Layout(dims, str(whole.dtype), batch, fixed, fixed and np.array_equal(whole, fewer))


def _batch(whole: Array, fewer: Array) -> tuple[int | None, bool]:
    """The axis of the rows, and whether the sizes are the same for any number of rows."""
    if whole.ndim != fewer.ndim:
        return None, False
    changed = [i for i, (a, b) in enumerate(zip(whole.shape, fewer.shape, strict=True)) if a != b]
    if len(changed) != 1:
        return None, not changed
    [axis] = changed
    k, rest = divmod(whole.shape[axis], _ROWS)
    if rest or fewer.shape[axis] != k * (_ROWS - 1):
        return None, False
    # The last rows, so that one that counts its place in the batch is no row of its own.
    last = np.take(whole, range(k, whole.shape[axis]), axis)
    return (axis if difference(last, fewer) <= _SAME else None), False


def _still(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, dropouts that were left in training mode doing nothing."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "Dropout":
            del node.input[2:]
    return copy
