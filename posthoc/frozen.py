"""Opens a frozen ONNX model and finds its last linear layer.

What the graph suggests is believed only after the model has run: on random rows, φ Wᵀ + b must be
z, the skipped tail of z must be the output, and a row's answer must not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from posthoc.contract import Array, LinearHead, ModelError, Task, TensorSpec
from posthoc.model.agreement import are_probabilities, believed, mismatch
from posthoc.model.dense import channels, dense_output, is_dense
from posthoc.model.files import load_model, modernised, opset_of
from posthoc.model.heads import Walk, walk, walks_from
from posthoc.model.probe import (
    Probe,
    Sample,
    check_inputs,
    first_that_runs,
    neighbour_effect,
    with_outputs,
)
from posthoc.model.reader import Graph
from posthoc.pixels import Layout
from posthoc.runtime import open_session, session_specs

# Kernels for other batch sizes round differently, by up to 1e-3; integer scales taken over a
# batch move outputs by per cents; noise and batch statistics by more.
_FIRM, _LOOSE = 2e-3, 0.1


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen model and where its features and outputs are.

    ``model`` is one file, opset 13 or newer, in which ``z`` (N×``z_dim``) and ``phi`` (N×D, None
    for a black box) name float32 tensors; ``head`` has ``z = phi @ weight.T + bias``. ``sha256``
    and ``size`` are of the file as given, or of ``model`` where that was put together here.
    ``output`` is the graph output that was followed and ``tail`` the operators between it and z,
    outermost first (a decomposed softmax counts as ``Softmax``). ``z_is_probs``: only
    probabilities could be had, so z stands for them and the caller takes their logarithm.
    ``notes`` are for the user. ``sources`` are the files, by sha256, that a model was put together
    from.
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
    sources: tuple[tuple[str, str], ...] = ()
    phi_dim: int | None = None  # D, where no head tells it
    dense: Layout | None = None  # z and φ are maps: N×C×H×W and the like

    @property
    def width(self) -> int | None:
        """D, the number of features; None for a black box."""
        if self.phi is None:
            return None
        return self.phi_dim if self.head is None else int(self.head.weight.shape[1])


def open_frozen(
    path: str | Path | bytes,
    *,
    task: Task,
    output: str | None = None,
    head: str | None = None,
    sample: Sample = None,
) -> Frozen:
    """Open an ONNX model (its path, or its bytes) for ``task``.

    ``output`` names the graph output to follow where there are several, ``head`` the node (or its
    result) of the linear layer where the search should not choose. ``sample`` gives real input
    rows for the check, or is asked for them once the inputs are known; without any, rows are drawn
    at random. Raises ModelError, naming the object,
    for a file that is not valid ONNX or does not run, a fixed batch size, rows that influence each
    other, sequence or map outputs, several labels per row, outputs that are not N×C, an opset that
    cannot be converted, and external data outside the model's folder. A model without a linear
    layer is a black box: no error, ``phi`` and ``head`` are None and ``notes`` says why.
    """
    proto, given, file = load_model(path)
    notes: list[str] = []
    data = given or proto.SerializeToString()
    inputs, outputs = session_specs(open_session(data))
    check_inputs(inputs)
    modern = modernised(proto, inputs, notes)
    if modern is not proto:
        proto = modern
        data = proto.SerializeToString()
    name = _choose_output(proto, outputs, output, task)
    graph = Graph(proto)
    walks = [walk(graph, name, links=task == "classification")]
    if head is not None:
        walks = walks_from(graph, head, name)
    rows, values = _probe(graph, inputs, name, walks, sample)
    _check_neighbours(neighbour_effect(proto, inputs, name, rows, values[name]), name, notes)
    spec = next(s.shape for s in outputs if s.name == name)
    layout = None
    if is_dense(values[name], spec):
        images = [s.name for s in inputs]
        made = dense_output(walks, values, name, spec, task, head, images)
        way, z, layout, found, stop = made.way, made.z, made.layout, made.found, made.stop
        width, probs = channels(layout, values[z]), made.probabilities
    else:
        way, z = believed(walks, values, name, task, head)
        width = int(np.prod(values[z].shape[1:]))
        probs = task == "classification" and not way.steps and are_probabilities(values[z])
        found, stop = way.found, way.stop
        wrong = "" if found is None else mismatch(values, found, z)
        if found is not None and wrong:
            stop, found = f"{found.node!r} looks like one, but {wrong}", None
    if not way.path:
        notes.append(f"{' ← '.join(walks[0].tail)} before {name!r} did not check; read after it")
    if task == "classification" and "sigmoid" in way.steps and width > 1:
        raise ModelError(
            f"output {name!r} is a sigmoid over {width} labels: multi-label models are not "
            "supported; give a model with one softmax"
        )
    if found is None and head is not None:
        raise ModelError(f"{head!r} is not the linear head of output {name!r}: {stop}")
    if layout is not None:
        where = {1: ", in axis 1", -1: ", in the last axis", None: ""}[layout.out_axis]
        notes.append(
            f"dense: every pixel of {name!r} is a row of {width} channel{'s' * (width > 1)}{where}"
        )
    if found is None:
        notes.append(f"black box, no linear head: {stop}; methods that need features do not apply")
    elif found.step:
        notes.append(
            f"the head is quantised: its outputs are φWᵀ + b rounded to steps of {found.step:.2g}; "
            "the model's own outputs may move by one step where these are read"
        )
    elif found.packed:
        notes.append("the weights of the head are quantised; it is computed to within 1 %")
    if probs:
        notes.append(f"output {name!r} holds probabilities: their logarithm stands for logits")
    added = len(proto.graph.node)
    proto.graph.node.extend(graph.needed([z, *([] if found is None else [found.phi])]))
    flat = layout is None
    z = _as_float32(proto, z, values[z], "z", flat)
    phi = None if found is None else _as_float32(proto, found.phi, values[found.phi], "phi", flat)
    if len(proto.graph.node) > added:
        data = proto.SerializeToString()
    whole = given or data
    return Frozen(
        model=data,
        sha256=hashlib.sha256(whole).hexdigest(),
        size=len(whole),
        file=file,
        inputs=inputs,
        outputs=outputs,
        opset=opset_of(proto),
        output=name,
        z=z,
        z_dim=width,
        phi=phi,
        head=None if found is None else found.linear,
        head_node=None if found is None else found.node,
        tail=way.tail,
        z_is_probs=probs,
        notes=tuple(notes),
        dense=layout,
    )


def expose(frozen: Frozen) -> bytes:
    """The model with φ and z as graph outputs beside its own."""
    proto = onnx.load_from_string(frozen.model)
    have = {o.name for o in proto.graph.output}
    widths = {frozen.z: frozen.z_dim}
    if frozen.phi is not None and frozen.width is not None:
        widths[frozen.phi] = frozen.width
    for name, width in widths.items():
        if name not in have:
            shape = [None, width] if frozen.dense is None else None
            proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return bytes(proto.SerializeToString())


def _choose_output(
    proto: onnx.ModelProto, outputs: Sequence[TensorSpec], name: str | None, task: Task
) -> str:
    names = [s.name for s in outputs]
    if name is not None:
        if name not in names:
            raise ModelError(f"the model has no output {name!r}; it has {', '.join(names)}")
        return name
    floats = [s.name for s in outputs if s.dtype.startswith("float") and s.shape != ()] or names
    graph = Graph(proto)
    # Logits, their softmax and their argmax are one output seen three times.
    ends = {walk(graph, n, links=task == "classification").inner for n in floats}
    if len(ends) != 1:
        raise ModelError(f"the model has outputs {', '.join(names)}; choose one with --output")
    return floats[0]


def _check_neighbours(effect: float, output: str, notes: list[str]) -> None:
    """ModelError where rows influence each other, a note where they do so by rounding."""
    if effect > _LOOSE:
        raise ModelError(
            f"output {output!r} of a row changes with the rows beside it, or from run to run, by "
            f"{effect:.2g} of its largest value; export the model in evaluation mode"
        )
    if effect > _FIRM:
        notes.append(
            f"output {output!r} of a row moves by up to {effect:.1%} with the rows beside it "
            "(quantised models do that): its answers depend on the batch"
        )


def _probe(
    graph: Graph,
    inputs: Sequence[TensorSpec],
    output: str,
    walks: Sequence[Walk],
    sample: Sample,
) -> tuple[Probe, Probe]:
    """Rows, and what every tensor that the walks name holds on them (φ: where it can be had)."""
    given = {s.name for s in inputs}
    names = [output, *(t for way in walks for t in way.path)]
    names = [n for n in dict.fromkeys(names) if n not in given]
    session = open_session(with_outputs(graph.model, names, graph.needed(names)))
    rows, outputs = first_that_runs(session, inputs, sample, names)
    values = {**rows, **dict(zip(names, map(np.asarray, outputs), strict=True))}
    for phi in dict.fromkeys(way.found.phi for way in walks if way.found is not None):
        if phi not in values:
            with contextlib.suppress(Exception):  # what was passed does not act on φ as on z
                session = open_session(with_outputs(graph.model, [phi], graph.needed([phi])))
                values[phi] = np.asarray(session.run([phi], rows)[0])
    return rows, values


def _as_float32(proto: onnx.ModelProto, name: str, value: Array, what: str, flat: bool) -> str:
    """``name``, or a new tensor of the graph that holds it as float32 and, where it is to be
    ``flat``, with two axes."""
    if value.dtype != np.float32:
        new = f"hedged/{what}/float32"
        proto.graph.node.append(helper.make_node("Cast", [name], [new], to=TensorProto.FLOAT))
        name = new
    if not flat:
        return name
    if value.ndim == 1:
        new, axes = f"hedged/{what}", f"hedged/{what}/axes"
        one: Any = np.array([1], np.int64)
        proto.graph.initializer.append(numpy_helper.from_array(one, axes))
        proto.graph.node.append(helper.make_node("Unsqueeze", [name, axes], [new]))
        name = new
    elif value.ndim > 2:
        new = f"hedged/{what}"
        proto.graph.node.append(helper.make_node("Flatten", [name], [new], axis=1))
        name = new
    return name
