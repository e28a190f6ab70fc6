"""Opens a frozen model from whatever it lies in: ONNX, a ``torch.export`` archive, a torch factory.

A torch model is exported to ONNX here, before any pass over the data; what is opened in the end is
always an ONNX graph, with a preprocessing graph fused in front where one is given.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from posthoc import registry
from posthoc.contract import Array, ModelError, Task, TensorSpec
from posthoc.export import Keep, export_torch
from posthoc.frozen import Frozen, open_frozen
from posthoc.model.answers import PHI, Z, open_answers
from posthoc.model.files import load_model
from posthoc.model.preprocess import fuse
from posthoc.model.probe import check_inputs
from posthoc.model.samples import Givers, Samples, example
from posthoc.network.sites import find_normalisations
from posthoc.runtime import open_session, session_specs

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors")
_EXPORTED = 4  # rows that a torch model is traced on
_SAFE = (
    "export it to ONNX (torch.onnx.export), or give module:factory with --checkpoint "
    "FILE.safetensors"
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a frozen model is, as the user says it.

    ``model`` is an ONNX file, a ``.pt2`` archive of ``torch.export``, or ``module:factory``: a
    function of a module that can be imported from the working directory, called without an
    argument, which returns a ``torch.nn.Module``. None: there is no model but columns of what it
    answered, see `posthoc.model.answers`. ``checkpoint`` has the weights of a factory's
    module: a safetensors file, or what ``torch.load(weights_only=True)`` takes. ``preprocess`` is
    an ONNX file to run in front. ``example`` is an ``.npz`` of input rows by name, for a torch
    module whose shapes and types the table does not show. ``trust_pickle`` lets a ``.pt2``, whose
    loading unpickles, be loaded. ``output`` and ``head`` are those of `open_frozen`.
    """

    model: str | Path | None
    checkpoint: str | Path | None = None
    preprocess: str | Path | None = None
    example: str | Path | None = None
    trust_pickle: bool = False
    output: str | None = None
    head: str | None = None


def open_model(
    source: Source, *, task: Task, samples: Samples | None = None, keep: Keep | None = None
) -> Frozen:
    """Open ``source`` for ``task``; ``samples`` are the rows that it is checked on.

    The inputs of a factory's module are the parameters of its ``forward`` (those with a default
    only where a column, ``samples.inputs`` or ``example`` has their name). Their shapes and types
    are those of ``example``, else the first reading of the columns on which the module runs: see
    `posthoc.model.samples.Samples.choices`. ``keep`` says what the export of a torch model must
    leave in the graph: see `export_torch`. The export is checked against the torch model on real
    rows, and its largest difference is among the notes. Raises ModelError as `open_frozen`,
    `export_torch`, `fuse` and the loaders in `posthoc.model.torch_models` do, before any pass over
    the data; DataError where the table cannot fill the inputs.
    """
    if source.model is None:
        return _answers(source, task, samples)
    kind = _kind(source)
    given = None if source.example is None else example(source.example)
    rows = Givers(samples, given, str(source.example))
    front = None if source.preprocess is None else _Front.open(source.preprocess)
    notes: list[str] = []
    if kind == "onnx" and front is None:
        return open_frozen(
            source.model, task=task, output=source.output, head=source.head, sample=rows.known
        )
    sources: list[tuple[str, str]] = []
    model = b""
    if kind == "onnx":
        proto, data, file = load_model(source.model)
        sources.append((file, hashlib.sha256(data or proto.SerializeToString()).hexdigest()))
    else:
        model = _exported(source, kind, front, rows, notes, keep)
        proto, file = onnx.load_from_string(model), _name(source, kind)
        files = [source.model] if kind == "program" else [source.checkpoint]
        sources += [(Path(f).name, _sha256(f)) for f in files if f is not None]
    if front is not None:
        name = Path(str(source.preprocess)).name
        sources.append((name, front.sha256))
        model = fuse(front.proto, proto, name=name, notes=notes, sample=rows.known)
        notes.append(f"{name} runs in front of the model")
    frozen = open_frozen(
        model, task=task, output=source.output, head=source.head, sample=rows.known
    )
    return dataclasses.replace(
        frozen, file=file, notes=(*notes, *frozen.notes), sources=tuple(sources)
    )


def remaining_modules(frozen: Frozen, task: Task) -> list[str]:
    """Names of the registered modules and scores that work on this model: all that fit the task,
    or, on a black box, those that read outputs and labels only, and those that work inside this
    network."""
    have = {"labels"}
    have |= set() if frozen.phi is None else {"features"}
    have |= set() if frozen.head is None else {"linear_head"}
    return [
        name
        for kind in (registry.MODULES, registry.SCORES)
        for name in registry.applicable(kind, task, have)
    ] + [n for n in _inside(frozen) if task in registry.info(n).tasks]


def _inside(frozen: Frozen) -> list[str]:
    """Names of the network-level modules that this graph has places for."""
    found = []
    if frozen.dense is not None and len(frozen.dense.spatial) == 2:
        found.append("bayescap_image")
    if frozen.z_is_probs or (frozen.dense is not None and frozen.dense.axis is None):
        return found
    kinds = {site.kind for site in find_normalisations(frozen.model, output=frozen.z)}
    batch = ["mc_batch_norm"] if "batch" in kinds else []
    return [*found, "mc_dropout", *batch, *(["abnn"] if kinds else [])]


def _answers(source: Source, task: Task, samples: Samples | None) -> Frozen:
    also = {f.name for f in dataclasses.fields(source) if getattr(source, f.name)}
    if also or samples is None or samples.inputs is None:
        raise ModelError(
            f"without a model there are columns of its outputs alone: give inputs {Z!r} and, of "
            f"features, {PHI!r}" + f"; leave {', '.join(sorted(also))} out" * bool(also)
        )
    specs = next(samples.choices(tuple(samples.inputs), "float32"))
    floats = [TensorSpec(name=s.name, dtype="float32", shape=s.shape) for s in specs]
    return open_answers(floats, task=task, sample=samples.rows)


def _kind(source: Source) -> str:
    """onnx, program or factory; ModelError for a file that is none, and for misplaced options."""
    model = str(source.model)
    suffix, kind = Path(model).suffix.lower(), "onnx"
    if suffix == ".pt2":
        kind = "program"
        if not source.trust_pickle:
            raise ModelError(
                f"{model}: loading a torch.export archive unpickles, so it can run code; {_SAFE}. "
                "For a file that you made yourself there is --trust-pickle"
            )
    elif suffix in _CHECKPOINTS:
        raise ModelError(
            f"{model} holds weights, or a pickled module, which is not unpickled; {_SAFE}"
        )
    elif _FACTORY.fullmatch(model) and not Path(model).exists():
        kind = "factory"
    if source.checkpoint is not None and kind != "factory":
        raise ModelError(f"--checkpoint goes with module:factory; {model} holds its own")
    if source.trust_pickle and kind != "program":
        raise ModelError(
            f"--trust-pickle is for .pt2 archives; nothing that {model} needs is unpickled"
        )
    return kind


@dataclass(frozen=True, slots=True)
class _Front:
    """A preprocessing graph, its inputs and outputs, and the sha256 of its file."""

    proto: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str

    @staticmethod
    def open(path: str | Path) -> _Front:
        proto, given, _ = load_model(path)
        data = given or proto.SerializeToString()
        inputs, outputs = session_specs(open_session(data))
        check_inputs(inputs)
        return _Front(proto, inputs, outputs, hashlib.sha256(data).hexdigest())

    def fills(self, names: list[str]) -> dict[str, str]:
        """Input of the model -> output: of the same name, or the only one for the only one."""
        own = [s.name for s in self.outputs]
        if len(own) == len(names) == 1:
            return {names[0]: own[0]}
        return {n: n for n in names if n in own}

    def run(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        session = open_session(self.proto.SerializeToString())
        made = session.run(None, {s.name: rows[s.name] for s in self.inputs})
        return dict(zip((s.name for s in self.outputs), map(np.asarray, made), strict=True))


def _exported(
    source: Source,
    kind: str,
    front: _Front | None,
    rows: Givers,
    notes: list[str],
    keep: Keep | None,
) -> bytes:
    """The ONNX bytes of a torch model; how far they are from it goes into the notes."""
    from posthoc.model import torch_models

    made = {s.name for s in front.outputs} if front is not None else set[str]()
    with torch_models.working_directory():
        if kind == "program":
            module = torch_models.load_program(str(source.model))
            specs = torch_models.program_inputs(module)
            names = [s.name for s in specs]
        else:
            module = torch_models.make_module(str(source.model))
            if source.checkpoint is not None:
                torch_models.load_weights(module, source.checkpoint)
            names = torch_models.input_names(module, lambda n: n in made or rows.names(n))
        fills = {} if front is None else front.fills(names)
        beside = () if front is None else front.inputs

        def feeds() -> Iterator[dict[str, Array]]:
            rest = [n for n in names if n not in fills]
            if kind == "program":
                readings = iter([tuple(s for s in specs if s.name in rest)])
            else:
                readings = rows.readings(rest, torch_models.float_type(module), beside)
            for reading in readings:
                raw = rows.needed((*beside, *reading))
                outputs = {} if front is None else front.run(raw)
                yield {n: outputs[fills[n]] if n in fills else raw[n] for n in names}

        try:
            feed = torch_models.first_accepted(module, feeds())
            tensors = torch_models.as_tensors(feed)
            examples = {k: v[:_EXPORTED] for k, v in tensors.items()}
            exported = export_torch(module, examples, rows=tensors, keep=keep)
        except ModelError as e:
            raise ModelError(f"{source.model}: {e}") from e
    count = len(next(iter(feed.values())))
    notes.append(
        f"exported to ONNX; differs from the torch model by at most {exported.difference:.1e} of "
        f"an output's largest value, on {count} rows"
    )
    notes += exported.notes
    return exported.model


def _name(source: Source, kind: str) -> str:
    model = str(source.model)
    return Path(model).name if kind == "program" else model.rpartition(":")[2]


def _sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
