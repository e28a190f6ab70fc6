"""A preprocessing graph in front of a model: two ONNX files become one frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from posthoc.contract import Array, ModelError, TensorSpec
from posthoc.model.files import OLDEST_OPSET, converted, inlined, opset_of
from posthoc.model.probe import Sample, close, first_that_runs
from posthoc.model.renaming import free_name, rename_tensors, tensor_names
from posthoc.runtime import open_session, session_specs

_PREFIX = "pre/"
_STANDARD = ("", "ai.onnx")


def matched(
    outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec], name: str
) -> dict[str, str]:
    """Model input -> output of the preprocessing graph ``name`` that fills it.

    Matched by name, or the only one to the only one. Raises ModelError for an output that no
    input takes, and for another type or shape.
    """
    if len(outputs) == 1 and len(inputs) == 1:
        pairs = {inputs[0].name: outputs[0].name}
    else:
        pairs = {o.name: o.name for o in outputs}
    takes = {s.name: s for s in inputs}
    for output in outputs:
        wanted = next((takes[i] for i, o in pairs.items() if o == output.name and i in takes), None)
        if wanted is None:
            raise ModelError(
                f"output {output.name!r} of {name} is no input of the model, which takes "
                f"{', '.join(takes)}; give them the same names"
            )
        fits = len(output.shape) == len(wanted.shape) and all(
            -1 in (a, b) or a == b for a, b in zip(output.shape, wanted.shape, strict=True)
        )
        if output.dtype != wanted.dtype or not fits:
            raise ModelError(
                f"output {output.name!r} of {name} is {output.dtype} of shape {output.shape}, and "
                f"input {wanted.name!r} of the model takes {wanted.dtype} of shape {wanted.shape}"
            )
    return pairs


def fuse(
    front: onnx.ModelProto,
    model: onnx.ModelProto,
    *,
    name: str,
    notes: list[str],
    sample: Sample = None,
) -> bytes:
    """One model: ``front`` (from the file ``name``), then ``model`` on what it gives.

    Inputs are those of ``front`` and those of ``model`` that it does not fill, under their own
    names; outputs are the model's. Names of ``front`` that the model has too take a prefix, and
    the older of two opsets is converted, which is added to ``notes``. The result is run on
    ``sample`` (else random rows) against the two one after the other. Raises ModelError for what
    `matched` says, an opset that cannot be converted, and outputs that differ.
    """
    front, model = inlined(front), inlined(model)
    apart = tuple(open_session(m.SerializeToString()) for m in (front, model))
    (takes, gives), (wants, ends) = (session_specs(s) for s in apart)
    pairs = matched(gives, wants, name)
    public = {s.name for s in (*wants, *ends) if s.name not in pairs}
    for spec in takes:
        if spec.name in public:
            raise ModelError(
                f"input {spec.name!r} of {name} is the name of an input or output of the model "
                "too; rename it"
            )
    target = max(opset_of(front), opset_of(model), OLDEST_OPSET)
    front, model = converted(front, target, takes, notes), converted(model, target, wants, notes)
    joined = _joined(front, model, pairs, {s.name for s in takes}, name).SerializeToString()
    session = open_session(joined)
    inputs, outputs = session_specs(session)
    rows, got = first_that_runs(session, inputs, sample)
    want = _one_after_the_other(apart, rows, pairs, [o.name for o in outputs])
    for spec, a, b in zip(outputs, got, want, strict=True):
        if not close(np.asarray(a), np.asarray(b)):
            raise ModelError(
                f"output {spec.name!r} of the model behind {name} is not what the two give one "
                "after the other"
            )
    return bytes(joined)


def _joined(
    front: onnx.ModelProto,
    model: onnx.ModelProto,
    pairs: Mapping[str, str],
    takes: set[str],
    name: str,
) -> onnx.ModelProto:
    front, model = _copy(front), _copy(model)
    # The inputs of the whole keep their names: a tensor of the model that is called so gives way.
    theirs = tensor_names(model.graph)
    taken = theirs | tensor_names(front.graph)
    moved = {n: free_name(_PREFIX + n, taken, _PREFIX) for n in sorted(theirs & takes)}
    rename_tensors(model.graph, moved)
    theirs = tensor_names(model.graph)
    fills = {output: moved.get(i, i) for i, output in pairs.items()}
    taken |= theirs
    ours = sorted(tensor_names(front.graph) - takes)
    clashes = {n: free_name(_PREFIX + n, taken, _PREFIX) for n in ours if n in theirs}
    rename_tensors(front.graph, {**clashes, **fills})
    nodes = {n.name for n in model.graph.node}
    for node in front.graph.node:
        node.name = free_name(node.name, nodes, _PREFIX) if node.name else ""
    constants = {t.name for t in front.graph.initializer}
    inputs = [i for i in front.graph.input if i.name not in constants]
    inputs += [i for i in model.graph.input if i.name not in fills.values()]
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.node[:], graph.input[:]
    graph.node.extend([*front.graph.node, *model.graph.node])
    graph.input.extend(inputs)
    graph.initializer.extend(front.graph.initializer)
    graph.sparse_initializer.extend(front.graph.sparse_initializer)
    graph.value_info.extend(v for v in front.graph.value_info if v.name not in fills.values())
    model.graph.CopyFrom(graph)
    model.ir_version = max(front.ir_version, model.ir_version)
    _join_opsets(front, model, name)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as e:  # the checker raises unrelated types
        raise ModelError(f"{name} cannot stand in front of the model: {str(e).strip()}") from e
    return model


def _join_opsets(front: onnx.ModelProto, model: onnx.ModelProto, name: str) -> None:
    have = {o.domain: o.version for o in model.opset_import if o.domain not in _STANDARD}
    for added in front.opset_import:
        if added.domain in _STANDARD:
            continue
        if have.get(added.domain, added.version) != added.version:
            raise ModelError(
                f"{name} uses version {added.version} of {added.domain} and the model version "
                f"{have[added.domain]}; export both with one version"
            )
        if added.domain not in have:
            model.opset_import.append(added)


def _one_after_the_other(
    apart: Sequence[Any],
    rows: Mapping[str, Array],
    pairs: Mapping[str, str],
    outputs: Sequence[str],
) -> list[Array]:
    first, second = apart
    takes, wants = ([i.name for i in s.get_inputs()] for s in (first, second))
    made = first.run(list(pairs.values()), {n: rows[n] for n in takes})
    feed = dict(zip(pairs, made, strict=True)) | {n: rows[n] for n in wants if n not in pairs}
    return list(second.run(list(outputs), feed))


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
