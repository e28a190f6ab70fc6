"""Opens a frozen ONNX model and finds its last linear layer.

What the graph suggests is believed only after the model has run: on random rows, φ Wᵀ + b must be
z, the skipped tail of z must be the output, and a row's answer must not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from posthoc.contract import Array, LinearHead, ModelError, Task, TensorSpec
from posthoc.heads import Graph, Step, Walk, find_linear, walk
from posthoc.runtime import open_session, session_specs

OLDEST_OPSET = 13  # heads are written for this opset and newer
_TARGET_OPSET = 17
_LARGEST = 2**31 - 1  # bytes; protobuf holds no more
_ROWS = 8  # of a probe
_SIZES = (8, 16, 32, 64, 224, 128, 256, 512, 1, 2, 3, 4)  # tried for a free axis
_HIGHS = (256, 100, 10, 2)  # integer inputs are drawn below these, in turn
Probe = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen model and where its features and outputs are.

    ``model`` is one file, opset 13 or newer, in which ``z`` (N×``z_dim``) and ``phi`` (N×D, None
    for a black box) name float32 tensors; ``head`` has ``z = phi @ weight.T + bias``. ``sha256``
    and ``size`` are of the file as given (with external data: of ``model``). ``output`` is the
    graph output that was followed and ``tail`` the operators between it and z, outermost first
    (a decomposed softmax counts as ``Softmax``). ``z_is_probs``: only probabilities could be had,
    so z stands for them and the caller takes their logarithm. ``notes`` are for the user.
    """

    model: bytes
    sha256: str
    size: int
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    output: str
    z: str
    z_dim: int
    phi: str | None
    head: LinearHead | None
    head_node: str | None
    tail: tuple[str, ...]
    z_is_probs: bool
    notes: tuple[str, ...]


def open_frozen(
    model: str | Path | bytes,
    *,
    task: Task,
    output: str | None = None,
    head: str | None = None,
    sample: Mapping[str, Array] | None = None,
) -> Frozen:
    """Open an ONNX model (a path, or its bytes) for ``task``.

    ``output`` names the graph output to follow where there are several, ``head`` the node (or its
    result) of the linear layer where the search should not choose. ``sample`` gives real input
    rows for the check; without it rows are drawn at random. Raises ModelError, naming the object,
    for a file that is not valid ONNX or does not run, a fixed batch size, rows that influence each
    other, sequence or map outputs, several labels per row, outputs that are not N×C, an opset that
    cannot be converted, and external data outside the model's folder. A model without a linear
    layer is a black box: no error, ``phi`` and ``head`` are None and ``notes`` says why.
    """
    proto, given, file = _load(model)
    notes: list[str] = []
    proto, changed = _modern(proto, notes)
    data = proto.SerializeToString() if changed else given
    inputs, outputs = session_specs(open_session(data))
    _check_inputs(inputs)
    name = _choose_output(proto, outputs, output)
    graph = Graph(proto)
    path = walk(graph, name)
    if head is not None:
        path = _named_head(graph, path, name, head)
    rows, values = _probe(proto, inputs, (name, *path.path), path, sample)
    _check_rows(proto, inputs, name, rows, values[name])
    found, stop = path.found, path.stop
    probs = False
    z = _two_axes(path.path, values, task, name)
    if path.steps and not _matches(_apply(path.steps, values[z]), values[name]):
        if head is not None:
            raise ModelError(f"output {name!r} does not follow from {head!r}; name another head")
        notes.append(f"the tail {' ← '.join(path.tail)} did not check; outputs are read after it")
        path, z, found = Walk((name,), (), (), None, ""), name, None
        stop = "the tail is not what it seems"
    width = int(np.prod(values[z].shape[1:]))
    if task == "classification":
        if "sigmoid" in path.steps and width > 1:
            raise ModelError(
                f"output {name!r} is a sigmoid over {width} labels: multi-label models are not "
                "supported; give a model with one softmax, or one output per label"
            )
        probs = not path.steps and _are_probabilities(values[z])
    if found is not None:
        wrong = _mismatch(values, found.phi, z, found.linear)
        if wrong and head is not None:
            raise ModelError(f"{head!r} is not the linear head of output {name!r}: {wrong}")
        if wrong:
            found, stop = None, f"{found.node!r} looks like one, but {wrong}"
    if found is None:
        notes.append(
            f"no linear head: {stop}. A black box: methods that need features are off the table"
        )
    if probs:
        notes.append(f"output {name!r} holds probabilities; their logarithm stands for logits")
    z_name = _as_float32(proto, z, values[z], "z")
    phi = None if found is None else _as_float32(proto, found.phi, values[found.phi], "phi")
    if z_name != z or (found is not None and phi != found.phi):
        data = proto.SerializeToString()
    whole = given if given else data
    return Frozen(
        model=data,
        sha256=hashlib.sha256(whole).hexdigest(),
        size=len(whole),
        file=file,
        inputs=inputs,
        outputs=outputs,
        opset=_opset(proto),
        output=name,
        z=z_name,
        z_dim=width,
        phi=phi,
        head=None if found is None else found.linear,
        head_node=None if found is None else found.node,
        tail=path.tail,
        z_is_probs=probs,
        notes=tuple(notes),
    )


def expose(frozen: Frozen) -> bytes:
    """The model with φ and z as graph outputs beside its own."""
    proto = onnx.load_from_string(frozen.model)
    have = {o.name for o in proto.graph.output}
    widths = {frozen.z: frozen.z_dim}
    if frozen.phi is not None and frozen.head is not None:
        widths[frozen.phi] = frozen.head.weight.shape[1]
    for name, width in widths.items():
        if name not in have:
            proto.graph.output.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
            )
    return proto.SerializeToString()


def _load(model: str | Path | bytes) -> tuple[onnx.ModelProto, bytes, str]:
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
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def _opset(proto: onnx.ModelProto) -> int:
    return max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))


def _modern(proto: onnx.ModelProto, notes: list[str]) -> tuple[onnx.ModelProto, bool]:
    """The model without local functions and at opset 13 or newer; whether that changed it."""
    changed = False
    if proto.functions:
        from onnx import inliner

        proto, changed = inliner.inline_local_functions(proto), True
    if not any(o.domain in ("", "ai.onnx") for o in proto.opset_import):
        # Only operators of other domains so far; the head behind them needs the standard ones.
        proto.opset_import.append(helper.make_opsetid("", _TARGET_OPSET))
        return proto, True
    old = _opset(proto)
    if old >= OLDEST_OPSET:
        return proto, changed
    from onnx import version_converter

    try:
        new = version_converter.convert_version(proto, _TARGET_OPSET)
        new.ir_version = max(new.ir_version, 8)
        before, after = (
            open_session(proto.SerializeToString()),
            open_session(new.SerializeToString()),
        )
    except Exception as e:  # the converter raises RuntimeError naming the operator, and others
        raise ModelError(
            f"opset {old} cannot be converted to {_TARGET_OPSET}: {str(e).strip()}; "
            f"export the model again with opset {OLDEST_OPSET} or newer"
        ) from e
    inputs, outputs = session_specs(before)
    _check_inputs(inputs)
    feed, _ = _first_that_runs(before, inputs, None)
    for spec, a, b in zip(outputs, before.run(None, feed), after.run(None, feed), strict=True):
        if not _close(np.asarray(b), np.asarray(a)):
            kinds = ", ".join(sorted({n.op_type for n in proto.graph.node}))
            raise ModelError(
                f"converting opset {old} to {_TARGET_OPSET} changes output {spec.name!r} (one of "
                f"{kinds}); export the model again with opset {OLDEST_OPSET} or newer"
            )
    notes.append(f"converted from opset {old} to {_TARGET_OPSET}; its outputs did not change")
    return new, True


def _check_inputs(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if spec.dtype == "str":
            raise ModelError(f"input {spec.name!r} takes text; only numbers can be fed")
        if not spec.shape or spec.shape[0] != -1:
            fixed = spec.shape[0] if spec.shape else "no"
            raise ModelError(
                f"input {spec.name!r} has {fixed} rows in its first axis; export the model with a "
                "dynamic batch dimension there"
            )


def _choose_output(proto: onnx.ModelProto, outputs: Sequence[TensorSpec], name: str | None) -> str:
    names = [s.name for s in outputs]
    if name is not None:
        if name not in names:
            raise ModelError(f"the model has no output {name!r}; it has {', '.join(names)}")
        return name
    floats = [s.name for s in outputs if s.dtype.startswith("float") and s.shape != ()]
    graph = Graph(proto)
    # Logits, their softmax and their argmax are one output seen three times.
    ends = {walk(graph, n).path[-1] for n in floats or names}
    if len(ends) != 1:
        raise ModelError(f"the model has outputs {', '.join(names)}; choose one with --output")
    return (floats or names)[0]


def _named_head(graph: Graph, path: Walk, output: str, head: str) -> Walk:
    """The walk that ends at the layer which the user names, with the affine steps behind it."""
    if path.found is not None and head in (path.found.node, path.path[-1]):
        return path
    node = next(
        (n for n in graph.model.graph.node if head == n.name or head in n.output),
        None,
    )
    if node is None:
        raise ModelError(f"the model has no node {head!r}")
    found, stop = find_linear(graph, node.output[0])
    if found is None:
        raise ModelError(f"{head!r} is not a linear layer: {stop}")
    raise ModelError(
        f"{head!r} does not lead to output {output!r} through operators that keep the logits"
        + (f"; the linear head there is {path.found.node!r}" if path.found else f": {path.stop}")
    )


def _probe(
    proto: onnx.ModelProto,
    inputs: Sequence[TensorSpec],
    names: Sequence[str],
    path: Walk,
    sample: Mapping[str, Array] | None,
) -> tuple[Probe, Probe]:
    """Rows, and the values of ``names`` and of φ on them."""
    wanted = list(dict.fromkeys((*names, *([path.found.phi] if path.found else []))))
    session = open_session(_with_outputs(proto, wanted))
    rows, _ = _first_that_runs(session, inputs, sample)
    return rows, dict(zip(wanted, map(np.asarray, session.run(wanted, rows)), strict=True))


def _with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    have = {o.name for o in copy.graph.output}
    # ONNX Runtime infers the type of an output that names none.
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    return copy.SerializeToString()


def _first_that_runs(
    session: Any, inputs: Sequence[TensorSpec], sample: Mapping[str, Array] | None
) -> tuple[Probe, list[Array]]:
    if sample is not None:
        feeds = iter([{s.name: np.asarray(sample[s.name], s.dtype) for s in inputs}])
    else:
        feeds = _random_rows(inputs)
    problem = ""
    for feed in feeds:
        try:
            return feed, session.run(None, feed)
        except Exception as e:  # whatever a kernel raises on rows that it does not like
            problem = problem or str(e).strip()
    raise ModelError(
        f"the model does not run on a batch of {_ROWS} "
        f"{'given' if sample is not None else 'random'} rows: {problem}"
    )


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


def _check_rows(
    proto: onnx.ModelProto, inputs: Sequence[TensorSpec], name: str, rows: Probe, whole: Array
) -> None:
    """A row alone and in other company has one answer."""
    n = len(next(iter(rows.values())))
    session = open_session(_with_outputs(proto, [name]))
    if not whole.shape or whole.shape[0] != n:
        raise ModelError(f"output {name!r} has shape {whole.shape} for {n} rows; axis 0 must be N")
    for part in (slice(0, 1), slice(n // 2, n)):
        alone = session.run([name], {s.name: rows[s.name][part] for s in inputs})[0]
        if not _close(np.asarray(alone), whole[part], 2e-3):
            raise ModelError(
                f"output {name!r} of a row changes with the rows beside it, or from run to run; "
                "export the model in evaluation mode"
            )


def _two_axes(path: Sequence[str], values: Probe, task: Task, output: str) -> str:
    """The innermost tensor of ``path`` that is N×C; else one that is N (a single output)."""
    for rank in (2, 1):
        for name in reversed(path):
            if values[name].ndim == rank and values[name].dtype.kind == "f":
                return name
    shape = values[path[0]].shape
    raise ModelError(
        f"output {output!r} leads to values of shape {shape}; {task} takes one row of numbers (N×C)"
    )


def _apply(steps: Sequence[Step], z: Array) -> Array:
    z = z.astype(np.float64)
    for step in steps:
        if step in ("softmax", "log_softmax"):
            z = z - z.max(axis=-1, keepdims=True)
            log = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
            z = log if step == "log_softmax" else np.exp(log)
        elif step == "sigmoid":
            z = 0.5 * (1 + np.tanh(z / 2))
        elif step == "log":
            with np.errstate(divide="ignore"):
                z = np.log(z)
        else:
            z = z.argmax(axis=-1)
    return z


def _close(got: Array, want: Array, tolerance: float = 1e-4) -> bool:
    """Equal to ``tolerance`` of the largest value, where both are finite or equal."""
    if got.dtype.kind not in "fiub" or got.size != want.size:
        return bool(np.array_equal(got, want))
    a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    scale = max(1.0, float(np.abs(b[finite]).max(initial=0.0)))
    same = np.abs(a[finite] - b[finite]).max(initial=0.0) <= tolerance * scale
    rest = np.array_equal(a[~finite], b[~finite], equal_nan=True)
    return bool(same and rest)


def _matches(got: Array, want: Array) -> bool:
    half = want.dtype == np.float16
    return _close(got, want, 5e-3 if half else 1e-4)


def _are_probabilities(p: Array) -> bool:
    """Rows of non-negative numbers that sum to 1; a single column within [0, 1]."""
    p = p.astype(np.float64).reshape(len(p), -1)
    inside = bool(((p >= 0) & (p <= 1 + 1e-3)).all())
    return inside and (p.shape[1] == 1 or bool(np.allclose(p.sum(axis=1), 1, atol=1e-3)))


def _mismatch(values: Probe, phi: str, z: str, head: LinearHead) -> str:
    """Why φ Wᵀ + b is not z on the probe; empty when it is."""
    features, outputs = values[phi], values[z]
    if features.ndim != 2:
        return f"its input has shape {features.shape}, not N×D"
    if features.shape[1] != head.weight.shape[1]:
        return f"its weight is {head.weight.shape} and its input {features.shape}"
    want = outputs.astype(np.float64).reshape(len(outputs), -1)
    got = features.astype(np.float64) @ head.weight.T + head.bias
    if got.shape != want.shape:
        return f"it gives {got.shape} and the outputs are {want.shape}"
    tolerance = 5e-3 if np.float16 in (features.dtype, outputs.dtype) else 1e-4
    error = np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-12)
    return "" if error <= tolerance else f"φWᵀ + b differs from the outputs by {error:.1e}"


def _as_float32(proto: onnx.ModelProto, name: str, value: Array, what: str) -> str:
    """``name``, or a new tensor of the graph that holds it as float32 with two axes."""
    if value.dtype != np.float32:
        new = f"hedged/{what}/float32"
        proto.graph.node.append(helper.make_node("Cast", [name], [new], to=TensorProto.FLOAT))
        name = new
    if value.ndim == 1:
        new, axes = f"hedged/{what}", f"hedged/{what}/axes"
        proto.graph.initializer.append(
            numpy_helper.from_array(cast(Any, np.array([1], np.int64)), axes)
        )
        proto.graph.node.append(helper.make_node("Unsqueeze", [name, axes], [new]))
        name = new
    return name
