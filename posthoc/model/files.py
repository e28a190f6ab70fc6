"""ONNX files: read whole, checked, and brought to an opset that a head can be written for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from posthoc.contract import ModelError, TensorSpec
from posthoc.model.probe import close, first_that_runs
from posthoc.runtime import open_session

OLDEST_OPSET = 13  # heads are written for this opset and newer
_TARGET_OPSET = 17
_STANDARD = ("", "ai.onnx")  # two names of the domain of standard operators
_LARGEST = 2**31 - 1  # bytes; protobuf holds no more


def load_model(model: str | Path | bytes) -> tuple[onnx.ModelProto, bytes, str]:
    """The parsed model, its own bytes (empty when external data was pulled in), its file name."""
    if isinstance(model, bytes):
        given, file, folder = model, "model.onnx", None
    else:
        path = Path(model)
        file, folder = path.name, path.parent
        try:
            if path.stat().st_size > _LARGEST:
                raise ModelError(f"{path} is larger than 2 GB, which one ONNX file cannot be")
            given = path.read_bytes()
        except OSError as e:
            raise ModelError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        proto = onnx.load_from_string(given)
        external = _pull_external(proto, folder, len(given))
        if not proto.graph.node:
            raise ModelError(f"{file}: the graph has no nodes")
        onnx.checker.check_model(proto)
    except ModelError:
        raise
    except Exception as e:  # protobuf and the checker raise unrelated types
        raise ModelError(f"{file} is not a valid ONNX model: {str(e).strip()}") from e
    return proto, b"" if external else given, file


def _pull_external(proto: onnx.ModelProto, folder: Path | None, size: int) -> bool:
    """Load external tensors into the model; whether there were any.

    Only plain files inside the model's folder are read, and no more than one ONNX file can hold.
    """
    tensors = [t for t in _tensors(proto) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        info = {e.key: e.value for e in tensor.external_data}
        where = info.get("location", "")
        if folder is None:
            raise ModelError(f"{tensor.name!r} lies in {where!r}; give the path of the model")
        path = folder / where
        root = folder.resolve()
        if path.resolve() != root / where or not path.resolve().is_relative_to(root):
            raise ModelError(
                f"{tensor.name!r} lies in {where!r}: external data must be a plain file inside "
                f"{folder}, reached through no link"
            )
        if not path.is_file():
            raise ModelError(f"{tensor.name!r} lies in {where!r}, which is not a file in {folder}")
        offset = int(info.get("offset", 0))
        length = int(info.get("length", path.stat().st_size - offset))
        size += length
        if size > _LARGEST:
            raise ModelError("the model with its external data is larger than 2 GB")
        with path.open("rb") as f:
            f.seek(offset)
            raw = f.read(length)
        if len(raw) < length:
            raise ModelError(f"{tensor.name!r}: {where!r} is cut off")
        tensor.raw_data = raw
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return bool(tensors)


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model, those in attributes and subgraphs included."""
    graphs = [proto.graph]
    nodes = [n for f in proto.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return max(int(o.version) for o in proto.opset_import if o.domain in _STANDARD)


def modernised(
    proto: onnx.ModelProto, inputs: Sequence[TensorSpec], notes: list[str]
) -> onnx.ModelProto:
    """The model without local functions and at opset 13 or newer; itself when it is so already.

    An opset that had to be converted is added to ``notes``. Raises ModelError when the converter
    cannot, or when an output changes on random rows.
    """
    proto = inlined(proto)
    old = opset_of(proto)
    return proto if old >= OLDEST_OPSET else converted(proto, _TARGET_OPSET, inputs, notes)


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without local functions, and with a version of the standard operators."""
    if proto.functions:
        from onnx import inliner

        proto = inliner.inline_local_functions(proto)
    if not any(o.domain in _STANDARD for o in proto.opset_import):
        # Only operators of other domains so far; the head behind them needs the standard ones.
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        proto = copy
        proto.opset_import.append(helper.make_opsetid("", _TARGET_OPSET))
    return proto


def converted(
    proto: onnx.ModelProto, target: int, inputs: Sequence[TensorSpec], notes: list[str]
) -> onnx.ModelProto:
    """The model at opset ``target``; itself when it is there already. Raises as `modernised`."""
    old = opset_of(proto)
    if old == target:
        return proto
    from onnx import version_converter

    kinds = ", ".join(sorted({n.op_type for n in proto.graph.node}))
    least = OLDEST_OPSET if old < OLDEST_OPSET else target
    advice = f"its operators are {kinds}; export the model again with opset {least} or newer"
    try:
        new = version_converter.convert_version(proto, target)
        before = open_session(proto.SerializeToString())
        after = open_session(new.SerializeToString())
        feed, want = first_that_runs(before, inputs, None)
        got = after.run(None, feed)
    except Exception as e:  # the converter raises RuntimeError naming the operator, and others
        raise ModelError(
            f"opset {old} cannot be converted to {target} ({str(e).strip()}); {advice}"
        ) from e
    for name, a, b in zip(proto.graph.output, want, got, strict=True):
        if not close(np.asarray(b), np.asarray(a)):
            raise ModelError(
                f"converting opset {old} to {target} changes output {name.name!r}; {advice}"
            )
    notes.append(f"converted from opset {old} to {target}; its outputs did not change")
    return new
