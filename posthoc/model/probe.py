"""Runs a model on a few rows to see whether it does what its graph suggests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from posthoc.contract import Array, ModelError, TensorSpec
from posthoc.runtime import open_session

_ROWS = 8
_SIZES = (8, 16, 32, 64, 224, 128, 256, 512, 1, 2, 3, 4)  # tried for a free axis
_HIGHS = (256, 100, 10, 2)  # integer inputs are drawn below these, in turn
Probe = dict[str, Array]
# Real rows by input, or who gives some for these inputs (None: has none) where random ones fail.
Sample = Mapping[str, Array] | Callable[[Sequence[TensorSpec]], Mapping[str, Array] | None] | None


def check_inputs(inputs: Sequence[TensorSpec]) -> None:
    """ModelError unless every input holds numbers and has the batch, of any size, in axis 0."""
    for spec in inputs:
        if spec.dtype == "str":
            raise ModelError(f"input {spec.name!r} takes text; only numbers can be fed")
        if not spec.shape or spec.shape[0] != -1:
            fixed = spec.shape[0] if spec.shape else "no"
            raise ModelError(
                f"input {spec.name!r} has {fixed} rows in its first axis; export the model with a "
                "dynamic batch dimension there"
            )


def with_outputs(
    proto: onnx.ModelProto, names: Sequence[str], nodes: Sequence[onnx.NodeProto] = ()
) -> bytes:
    """The model with inner tensors as further outputs, and the ``nodes`` that make some of them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.node.extend(nodes)
    have = {o.name for o in copy.graph.output}
    # ONNX Runtime infers the type of an output that names none.
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    return bytes(copy.SerializeToString())


def first_that_runs(
    session: Any, inputs: Sequence[TensorSpec], sample: Sample, names: Sequence[str] | None = None
) -> tuple[Probe, list[Array]]:
    """Rows on which the model runs, and the outputs ``names`` (default: all) on them.

    Rows are those of ``sample``, else random ones: free axes and the range of integers are tried
    in turn until every output is finite (an attention mask of 200 makes NaN). Where none is,
    whoever gives samples is asked for them. Raises ModelError when nothing runs.
    """
    ran: list[tuple[Probe, list[Array]]] = []
    problem = ""
    for kind, feeds in _kinds(inputs, sample):
        problem = ""
        for feed in feeds:
            try:
                outputs = session.run(names, feed)
            except Exception as e:  # whatever a kernel raises on rows that it does not like
                count = len(next(iter(feed.values())))
                problem = problem or f"{count} {kind} rows: {str(e).strip()}"
                continue
            if all(np.isfinite(o).all() for o in outputs if np.asarray(o).dtype.kind == "f"):
                return feed, outputs
            ran.append((feed, outputs))
            if len(ran) == len(_HIGHS):
                break  # other sizes will not help
    if ran:
        return ran[-1]
    raise ModelError(f"the model does not run on a batch of {problem}")


def _kinds(inputs: Sequence[TensorSpec], sample: Sample) -> Iterator[tuple[str, Iterable[Probe]]]:
    """Rows to try, and what to call them."""
    if isinstance(sample, Mapping):
        yield "given", [_cast(sample, inputs)]
        return
    yield "random", _random_rows(inputs)
    real = None if sample is None else sample(inputs)
    if real is not None:
        yield "real", [_cast(real, inputs)]


def _cast(sample: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> Probe:
    return {s.name: np.asarray(sample[s.name], s.dtype) for s in inputs}


def _random_rows(inputs: Sequence[TensorSpec]) -> Iterator[Probe]:
    free = any(-1 in s.shape[1:] for s in inputs)
    integers = any(not s.dtype.startswith(("float", "bool")) for s in inputs)
    for size in _SIZES if free else _SIZES[:1]:
        for high in _HIGHS if integers else _HIGHS[:1]:
            rng = np.random.default_rng(0)
            yield {s.name: _draw(rng, s, size, high) for s in inputs}


def _draw(rng: np.random.Generator, spec: TensorSpec, size: int, high: int) -> Array:
    shape = (_ROWS, *(size if d == -1 else d for d in spec.shape[1:]))
    if spec.dtype.startswith("float"):
        return rng.standard_normal(shape).astype(spec.dtype)
    if spec.dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, min(high, np.iinfo(spec.dtype).max), shape).astype(spec.dtype)


def neighbour_effect(
    proto: onnx.ModelProto, inputs: Sequence[TensorSpec], name: str, rows: Probe, whole: Array
) -> float:
    """How far an output moves, relative to its largest value, when a row is asked for again,
    alone and in other company. Raises ModelError when the output does not hold one answer a row.
    """
    n = len(next(iter(rows.values())))
    session = open_session(with_outputs(proto, [name]))
    if not whole.shape or whole.shape[0] != n:
        raise ModelError(f"output {name!r} has shape {whole.shape} for {n} rows; axis 0 must be N")
    worst = 0.0
    for part in (slice(0, 1), slice(n // 2, n)):
        try:
            alone = session.run([name], {s.name: rows[s.name][part] for s in inputs})[0]
        except Exception as e:  # whatever a kernel raises on a batch that it does not like
            raise ModelError(f"the model runs on {n} rows and not on fewer: {e}") from e
        worst = max(worst, difference(np.asarray(alone), whole[part]))
    return worst


def close(got: Array, want: Array, tolerance: float = 1e-4) -> bool:
    """Whether the `difference` is at most ``tolerance``."""
    return difference(got, want) <= tolerance


def difference(got: Array, want: Array) -> float:
    """Largest difference relative to the largest wanted value; inf where one is not finite and
    the other is not the same, and for values that are not numbers and not equal."""
    if got.dtype.kind not in "fiub" or got.size != want.size:
        return 0.0 if np.array_equal(got, want) else np.inf
    a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return np.inf
    scale = max(float(np.abs(b[finite]).max(initial=0.0)), 1e-12)
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale
