"""What a run is: everything that its output bytes depend on, pinned in ``_run.json``.

The run's id is the hash of that file and stands in the footer of every output, so an output is
known to belong to this bundle, these settings and this input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from calibration.bundle import Bundle
from service.scoring.errors import ScoringError, first_line
from service.scoring.formats.format import Pixels
from service.scoring.output import Output
from service.scoring.sources import Source

RUN = "_run.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BundleRecord(_Record):
    """The bundle that answers."""

    name: str
    version: str
    identity: str


class Settings(_Record):
    """Settings that move an answer, if only in its last bit, or the cut into files."""

    batch_size: int
    threads: int
    provider: str
    alpha: float
    passthrough: tuple[str, ...]
    fragment_rows: int
    outputs: tuple[str, ...] = ()
    pixels: Pixels = Pixels()
    labels: tuple[str, ...] = ()


class InputFile(_Record):
    """One file of the input: size in bytes, time of change, rows (None: unreadable); of a folder
    of images these are sum, last and count, and ``digest`` tells of each file."""

    name: str
    size: int
    mtime_ns: int
    rows: int | None
    digest: str | None = None


class RunManifest(_Record):
    """One run."""

    format: int = 1
    bundle: BundleRecord
    settings: Settings
    columns: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    input: tuple[InputFile, ...]

    def text(self) -> bytes:
        """The bytes of ``_run.json``."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @property
    def run(self) -> str:
        """The id of the run: 32 hex digits of the sha256 of the manifest."""
        return run_id(self.text())


def run_id(text: bytes) -> str:
    """The id of the run that a manifest of these bytes describes."""
    return hashlib.sha256(text).hexdigest()[:32]


def versions() -> dict[str, str]:
    """The software here that an answer or a file may depend on."""
    found = {name: version(name) for name in ("hedged", "pyarrow")}
    return found | {"onnxruntime": _onnxruntime()}


def describe_run(
    bundle: Bundle, settings: Settings, schema: pa.Schema, sources: tuple[Source, ...]
) -> RunManifest:
    """The manifest of a run with the software that is installed here."""
    m = bundle.manifest
    return RunManifest(
        bundle=BundleRecord(name=m.name, version=m.version, identity=bundle.identity),
        settings=settings,
        columns=tuple((f.name, str(f.type)) for f in schema),
        versions=versions()
        | ({"pillow": version("pillow")} if any(s.files for s in sources) else {}),
        input=tuple(
            InputFile(name=s.name, size=s.size, mtime_ns=s.mtime_ns, rows=s.rows, digest=s.digest)
            for s in sources
        ),
    )


def read_manifest(output: Output) -> RunManifest:
    """The manifest in an output. Raises ScoringError when it is no manifest of this version."""
    try:
        with output.open(RUN) as file:
            text = file.read()
    except OSError as e:
        raise ScoringError(
            f"{output.text}/{RUN} cannot be read: {first_line(e)}; run the same command again"
        ) from e
    try:
        return RunManifest.model_validate_json(text)
    except ValidationError as e:
        raise ScoringError(
            f"{output.text}/{RUN} is not the manifest of a run of this version; --overwrite starts "
            "again"
        ) from e


def check_same_run(folder: str, old: RunManifest, new: RunManifest) -> None:
    """Raise ScoringError, naming each difference, when ``folder`` belongs to another run.

    A file that could not be read when the run began may have been mended since, or taken away.
    """
    found = list(differences(old, new))
    if not found:
        return
    shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    raise ScoringError(
        f"{folder} holds another run: {shown}. Go on as that run was begun, give another folder, "
        "or start again with --overwrite"
    )


def differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """How two runs differ, one sentence each."""
    for part in ("bundle", "settings"):
        was, now = getattr(old, part), getattr(new, part)
        for name in type(was).model_fields:
            yield from _changed(f"{part} {name}", getattr(was, name), getattr(now, name))
    yield from _changed("format", old.format, new.format)
    for name in sorted(old.versions.keys() | new.versions.keys()):
        yield from _changed(f"version of {name}", old.versions.get(name), new.versions.get(name))
    if old.columns != new.columns:
        names = sorted({c[0] for c in set(old.columns) ^ set(new.columns)})
        yield f"the output columns differ ({', '.join(names) or 'their order'})"
    before, after = ({f.name: f for f in m.input} for m in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name in before and before[name].rows is None:
            continue  # nothing was made of it
        if name not in after:
            yield f"input file {name} is gone"
        elif name not in before:
            yield f"input file {name} is new"
        elif before[name] != after[name]:
            yield f"input file {name} was changed"


def _changed(what: str, was: Any, now: Any) -> Iterator[str]:
    if was != now:
        yield f"{what} was {was}, is {now}"


def _onnxruntime() -> str:
    import onnxruntime  # the distribution's name depends on the platform

    return str(onnxruntime.__version__)
