"""A torch module → ONNX bytes, checked against the module on real rows."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

from posthoc.contract import Array, ModelError
from posthoc.model.quiet import quiet
from posthoc.model.renaming import rename_tensors, tensor_names
from posthoc.runtime import open_session

Keep = Literal["dropout", "normalisation"]

OPSET = 20
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Exported:
    """A serialised ONNX model, and its largest difference from the module on the rows that were
    compared, relative to the largest value of the output; notes for the user."""

    model: bytes
    difference: float
    notes: tuple[str, ...] = ()


def export_torch(
    module: Any,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    input_names: Sequence[str] | None = None,
    rows: tuple[Any, ...] | Mapping[str, Any] | None = None,
    keep: Keep | None = None,
) -> Exported:
    """Export a ``torch.nn.Module`` (in evaluation mode) or a ``torch.export`` program to ONNX.

    ``example_inputs`` are tensors with the batch in axis 0: positional arguments, whose names in
    the graph are ``input_names``, or arguments by name. The export is run in ONNX Runtime on
    ``rows`` (the same arguments; default: the examples), whole and in a smaller batch. Where the
    module returns a dictionary or a named tuple, the graph's outputs take its names. ``keep`` says
    what stays a node where the exporter would remove it: ``"normalisation"`` (BatchNormalization
    with its running statistics, ε and momentum), or ``"dropout"`` (Dropout nodes that do nothing,
    as sites for noise; normalisations too). Raises ModelError for an operator that has no ONNX
    form, naming it, for a batch dimension that the export fixed, for outputs that differ by more
    than 1e-4, saying which and where, and where dropout is to be kept and there is none.
    """
    import torch

    names = list(example_inputs) if isinstance(example_inputs, Mapping) else list(input_names or ())
    if len(names) != len(example_inputs):
        raise ModelError(
            f"{len(names)} input names ({', '.join(names)}) for {len(example_inputs)} "
            "example inputs"
        )
    examples = [_two_rows(torch.as_tensor(x)) for x in _values(example_inputs)]
    given = examples if rows is None else [torch.as_tensor(x) for x in _values(rows)]
    program = isinstance(module, torch.export.ExportedProgram)
    run = module.module() if program else module
    if not isinstance(example_inputs, Mapping):
        positional = len(names)
    else:
        positional = _positional(module) if program else 0

    def arguments(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        by_name = zip(names[positional:], tensors[positional:], strict=True)
        return tuple(tensors[:positional]), dict(by_name)

    def outputs(tensors: Sequence[Any]) -> list[tuple[str, Array]]:
        args, kwargs = arguments(tensors)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _flat(run(*args, **kwargs))

    with _evaluating(None if program else module):
        model, notes = _exported(torch, module, *arguments(examples), names, program, keep)
        _check_batch(model, program)
        _name_outputs(model, [name for name, _ in outputs(examples)])
        data = bytes(model.SerializeToString())
        session = open_session(data)
        difference = 0.0
        for part in (given, [x[:1] for x in given]):
            want = outputs(part)
            feed = {n: x.numpy(force=True) for n, x in zip(names, part, strict=True)}
            try:
                got = session.run(None, feed)
            except Exception as e:  # kernels raise unrelated types
                raise ModelError(f"the exported model fails on {len(part[0])} rows: {e}") from e
            found = [o.name for o in session.get_outputs()]
            for name, a, (_, b) in zip(found, got, want, strict=True):
                difference = max(difference, _difference(name, a, b))
    return Exported(data, difference, tuple(notes))


def _values(given: tuple[Any, ...] | Mapping[str, Any]) -> list[Any]:
    return list(given.values() if isinstance(given, Mapping) else given)


def _positional(program: Any) -> int:
    """How many of a program's inputs are positional arguments; the others go by name."""
    signature = program.graph_signature.user_inputs
    args, _ = program.call_spec.in_spec.unflatten(list(signature))
    return len(args)


def _exported(
    torch: Any,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: list[str],
    program: bool,
    keep: Keep | None,
) -> tuple[onnx.ModelProto, list[str]]:
    # A program has its dynamic dimensions already; a module gets one, shared by all inputs.
    batch = {0: torch.export.Dim("batch")}
    shapes: Any = dict.fromkeys(names, batch) if kwargs else tuple(batch for _ in names)
    notes: list[str] = []
    more: dict[str, Any] = {}
    try:
        with quiet("torch.onnx"):
            if keep is not None:
                from posthoc.network import keep as kept

                more["optimize"] = False
                if keep == "dropout":
                    if not program:
                        module, program = kept.captured(module, args, kwargs, shapes), True
                    module, notes = kept.mark_dropouts(module)
                    more["custom_translation_table"] = kept.translations()
            done = torch.onnx.export(
                module,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                dynamic_shapes=None if program else shapes,
                verbose=False,
                **more,
            )
            model: onnx.ModelProto = done.model_proto
            if keep is not None:
                model = kept.optimised(model)
            _clean(model)
            onnx.checker.check_model(model, full_check=True)
    except ModelError:
        raise
    except Exception as e:  # the exporter wraps whatever tracing and translation raise
        raise ModelError(_reason(e)) from e
    return model, notes


def _name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """The names that the module gives its outputs, where it does and where they are free."""
    taken = tensor_names(model.graph)
    own = [o.name for o in model.graph.output]
    if len(set(own)) < len(own):
        return
    for old, new in zip(own, names, strict=False):
        if new and new not in taken:
            rename_tensors(model.graph, {old: new})
            taken.add(new)


def _clean(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes, which hold stack traces and paths of this machine."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    for body in (proto.graph, *proto.functions):
        _strip(body)


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


def _check_batch(proto: onnx.ModelProto, program: bool) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            fixed = dims[0].dim_value if dims else "no rows"
            advice = (
                "look in the module for a three-operand einsum or a size taken from the example's "
                "shape"
            )
            if program:
                advice = "export it with a dynamic_shapes that has torch.export.Dim there"
            raise ModelError(f"the export fixed the batch of {value.name!r} to {fixed}; {advice}")


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


def _flat(result: Any, name: str = "") -> list[tuple[str, Array]]:
    """The tensors of what a module returns, in the order in which they become graph outputs, with
    the names that dictionaries and named tuples give them."""
    if isinstance(result, Mapping):
        return [a for key, r in result.items() for a in _flat(r, str(key))]
    if isinstance(result, tuple | list):
        fields = getattr(result, "_fields", [""] * len(result))
        return [a for key, r in zip(fields, result, strict=True) for a in _flat(r, key)]
    return [] if result is None else [(name, np.asarray(result.numpy(force=True)))]


def _two_rows(x: Any) -> Any:
    # An example of one row would fix the batch at 1.
    return x if len(x) > 1 else x.repeat_interleave(2, dim=0)


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    before = [] if module is None else [(m, m.training) for m in module.modules()]
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
