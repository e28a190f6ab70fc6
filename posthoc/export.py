"""A torch module → ONNX bytes, checked against the module on real rows."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from posthoc.contract import Array, ModelError
from posthoc.runtime import open_session

OPSET = 20
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Exported:
    """A serialised ONNX model, and its largest difference from the module on the rows that were
    compared, relative to the largest value of the output."""

    model: bytes
    difference: float


def export_torch(
    module: Any,
    example_inputs: tuple[Any, ...],
    *,
    input_names: Sequence[str],
    rows: tuple[Any, ...] | None = None,
) -> Exported:
    """Export a ``torch.nn.Module`` (in evaluation mode) or a ``torch.export`` program to ONNX.

    ``example_inputs`` are its positional arguments, tensors with the batch in axis 0;
    ``input_names`` their names in the graph. The export is run in ONNX Runtime on ``rows``
    (default: the examples), whole and in a smaller batch. Raises ModelError for an operator that
    has no ONNX form, naming it, for a batch dimension that the export fixed, and for outputs that
    differ by more than 1e-4, saying which and where.
    """
    import torch

    if len(input_names) != len(example_inputs):
        raise ModelError(
            f"{len(input_names)} input names ({', '.join(input_names)}) for "
            f"{len(example_inputs)} example inputs"
        )
    examples = tuple(_two_rows(torch.as_tensor(x)) for x in example_inputs)
    given = examples if rows is None else tuple(torch.as_tensor(x) for x in rows)
    program = isinstance(module, torch.export.ExportedProgram)
    run = module.module() if program else module
    with _evaluating(None if program else module):
        model = _exported(torch, module, examples, list(input_names), program)
        _check_batch(onnx.load_from_string(model))
        session = open_session(model)
        difference = 0.0
        for part in (given, tuple(x[:1] for x in given)):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                want = _flat(run(*part))
            feed = {n: x.numpy(force=True) for n, x in zip(input_names, part, strict=True)}
            try:
                got = session.run(None, feed)
            except Exception as e:  # kernels raise unrelated types
                raise ModelError(f"the exported model fails on {len(part[0])} rows: {e}") from e
            names = [o.name for o in session.get_outputs()]
            for name, a, b in zip(names, got, want, strict=True):
                difference = max(difference, _difference(name, a, b))
    return Exported(model, difference)


def _exported(
    torch: Any, module: Any, examples: tuple[Any, ...], names: list[str], program: bool
) -> bytes:
    # A program has its dynamic dimensions already; a module gets one, shared by all inputs.
    batch = torch.export.Dim("batch")
    shapes = None if program else tuple({0: batch} for _ in examples)
    try:
        with _silence():
            done = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
            model = _bare(done.model_proto)
            onnx.checker.check_model(model, full_check=True)
    except Exception as e:  # the exporter wraps whatever tracing and translation raise
        raise ModelError(_reason(e)) from e
    return model


def _bare(proto: onnx.ModelProto) -> bytes:
    """The model without the exporter's notes, which hold stack traces and paths of this machine."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    for body in (proto.graph, *proto.functions):
        _strip(body)
    return bytes(proto.SerializeToString())


def _strip(body: Any) -> None:
    """A graph or function, the graphs inside its nodes too, without its notes."""
    body.doc_string = ""
    del body.metadata_props[:]
    parts = [*body.node, *body.value_info]
    if isinstance(body, onnx.GraphProto):
        parts += [*body.initializer, *body.input, *body.output]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    for node in body.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _strip(inner)


def _reason(error: BaseException) -> str:
    """What stopped an export: the operator without an ONNX form, else the first cause."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for e in chain:
        if operator := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(e)):
            return f"operator {operator[1]} has no ONNX form; replace it in the module"
    first = next(iter(str(chain[-1]).strip().splitlines()), type(chain[-1]).__name__)
    return f"the module cannot be exported to ONNX: {first}"


def _check_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            fixed = dims[0].dim_value if dims else "no rows"
            raise ModelError(
                f"the export fixed the batch of {value.name!r} to {fixed}; look in the "
                "module for a three-operand einsum or a size taken from the example's shape"
            )


def _difference(name: str, got: Any, want: Array) -> float:
    got = np.asarray(got)
    if got.shape != want.shape:
        raise ModelError(f"output {name!r} has shape {got.shape}, the module gives {want.shape}")
    a, b = got.astype(np.float64), want.astype(np.float64)
    error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    relative = float(error.max(initial=0.0)) / max(float(np.abs(b).max(initial=0.0)), 1e-12)
    if not relative <= _TOLERANCE:
        at = tuple(
            int(i)
            for i in np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), error.shape)
        )
        raise ModelError(
            f"output {name!r} of the export differs from the module by {relative:.1e} at {at}: "
            f"{a[at]:.6g} and {b[at]:.6g}"
        )
    return relative


def _flat(result: Any) -> list[Array]:
    """The tensors of what a module returns, in the order in which they become graph outputs."""
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, tuple | list):
        return [a for r in result for a in _flat(r)]
    return [np.asarray(result.numpy(force=True))]


def _two_rows(x: Any) -> Any:
    # An example of one row would fix the batch at 1.
    return x if len(x) > 1 else x.repeat_interleave(2, dim=0)


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    training = module is not None and module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the exporter's progress, its remarks on torchvision and its warnings to itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
