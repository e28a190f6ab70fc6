"""The bundle: an immutable folder that holds a fitted predictor and everything needed to trust it.

``manifest.json`` names every other file with its size and sha256; the bundle's identity is the
sha256 of the manifest itself. Loading reads each file once, checks it, and refuses whatever the
manifest does not name. Nothing in a bundle is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load as load_tensors

from calibration.wire import external_data
from posthoc.contract import Array, BundleError, Task, TensorSpec
from posthoc.mapping import TableMapping

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PREDICTOR = "predictor.onnx"
HEAD = "head.onnx"
STATE = "state.safetensors"
CONFORMAL = "conformal.safetensors"
REFERENCE = "reference.parquet"
GOLDEN = "golden.npz"
EXAMPLES = "examples.json"
MAX_MANIFEST = 16 << 20


class _Record(BaseModel):
    # Schema 1 grows by optional fields only, so an older reader may meet fields it does not know.
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRecord(_Record):
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


class FrozenRecord(_Record):
    """The frozen model that the bundle was fitted for."""

    file: str
    size: int
    sha256: str
    head: str | None  # node name of the linear head; None for a black box
    features: int | None  # D, the width of the features
    output: str | None = None  # the graph output that the head stands beside
    logits: str | None = None  # graph output of ours: the frozen logits (or mean) before anything


class FittedRecord(_Record):
    """A module or score: registry name, settings, and notes such as the prior precision found."""

    name: str
    settings: dict[str, Any] = {}


class FamilyRecord(_Record):
    """The family of probabilities that is served after temperature and strength, and what was
    tried for it: name → (mean cross-validated gain over them in nats a row, its lower bound)."""

    name: str
    gains: dict[str, tuple[float, float]] = {}


class CellRecord(_Record):
    """What the threshold of one class, cluster or group promises: as `Guarantee`, among its own n
    rows."""

    name: str
    n: int
    rank: int  # n + 1 when n is too small for the level
    threshold: float | None  # None stands for +inf


class Guarantee(_Record):
    """What one threshold promises: rank k of n at level alpha; coverage is Beta(k, n+1-k).

    ``kind`` risk: of a dense model the expected share of a new image's pixels that are not covered
    is at most alpha (conformal risk control over n images). ``kind`` missed: the expected share of
    a class's pixels that its mask misses, in a new image that shows the class, is at most alpha.
    """

    alpha: float
    n: int
    rank: int  # n + 1 when n is too small for the level: the set is then everything; 0 for a risk
    kind: Literal["coverage", "risk", "missed"] = "coverage"
    threshold: float | None  # None stands for +inf
    n_needed: int  # of each cell, where there are some
    cells: tuple[CellRecord, ...] = ()

    @property
    def exact(self) -> float:
        """The coverage over all calibrations, where scores do not tie: k / (n + 1)."""
        return self.rank / (self.n + 1)

    @property
    def law(self) -> tuple[int, int] | None:
        """(k, n + 1 - k) of the Beta distribution that the coverage of one calibration, this one,
        is drawn from where scores do not tie; None where it is no such draw: everything is
        covered, or the promise is another."""
        lawful = self.kind == "coverage" and self.rank <= self.n and self.threshold is not None
        return (self.rank, self.n + 1 - self.rank) if lawful else None


class ConformalRecord(_Record):
    """Sets (lac, raps, …) or intervals (normalised residual, …).

    ``given``: each class, cluster of classes or group has a threshold and a promise of its own.
    ``shift``: scores are weighted for rows that differ so, ``weights`` saying what they are worth;
    the threshold is a class's or a row's own then, and the promise as good as the weights.
    ``randomised``: scores take the run-time input ``u``; without it sets are larger.
    """

    method: str
    settings: dict[str, Any] = {}
    guarantees: tuple[Guarantee, ...]
    given: Literal["class", "cluster", "group"] | None = None
    shift: Literal["target", "covariate"] | None = None
    weights: dict[str, float] = {}
    randomised: bool = False


class OodRecord(_Record):
    """The out-of-distribution flag: P(false-alarm rate > alpha) <= delta over calibration.
    ``tried``: where the score was chosen, the AUROC of each by kind of stand-in for strange rows.
    """

    score: FittedRecord
    alpha: float
    delta: float
    n: int
    n_needed: int
    threshold: float | None  # None: too few rows for the promise, nothing is flagged
    tried: dict[str, dict[str, float]] = {}


class AbstainRecord(_Record):
    """P(wrong | answered) <= max_error with probability >= 1-delta; None: abstain on all."""

    max_error: float
    delta: float
    n: int
    n_needed: int
    threshold: float | None
    answered: float  # share of conformal rows answered at the threshold


class SplitRecord(_Record):
    """How rows were told apart and what each part was allowed to do (statistics.md section 1)."""

    seed: int
    by: str | None
    rows: dict[str, int]
    items: dict[str, int] | None = None  # distinct values of ``by``: what ranks count
    uses: dict[str, str]


class DenseRecord(_Record):
    """Fields are maps: their channels are on axis ``channels`` (1, -1 or none), ``spatial`` are the
    other axes; ``pixels`` were drawn from each image."""

    channels: int | None
    spatial: tuple[int, ...]
    pixels: int


class MemoryRecord(_Record):
    """What the graph holds of a row while it runs, about: ``row_bytes`` of one whose inputs have so
    many ``values`` in all (`posthoc.model.memory`)."""

    row_bytes: int
    values: int


class RenewalRecord(_Record):
    """What a bundle that was renewed on fresh labels came from: identity and version of the former
    one, predictions of it from ``since`` to ``until`` (ISO 8601) of which ``served`` were made and
    ``labelled`` had a label, by the part that they had (``rows``, divided by a hash and ``seed``).
    ``factor`` is what its temperature or standard deviation was multiplied by; ``before`` and
    ``after`` are figures of both on the measured rows."""

    identity: str
    version: str
    since: str
    until: str
    served: int
    labelled: int
    seed: int
    rows: dict[str, int]
    factor: float
    renewed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}


class Manifest(_Record):
    """Everything that a reader of the bundle must know, as plain JSON."""

    schema_version: int = SCHEMA_VERSION
    name: str
    version: str
    task: Task
    created: str
    classes: tuple[str, ...] | None = None
    mapping: TableMapping
    inputs: tuple[TensorSpec, ...]  # the frozen model's own inputs
    optional_inputs: tuple[TensorSpec, ...] = ()  # of a row: group, u
    outputs: tuple[TensorSpec, ...]  # ours, design section 5.3 order, present ones only
    frozen_outputs: tuple[TensorSpec, ...] = ()
    output_names: dict[str, str] = {}  # field -> graph output, where a clash forced a prefix
    frozen: FrozenRecord
    dense: DenseRecord | None = None
    memory: MemoryRecord | None = None  # None: not known
    module: FittedRecord
    prediction: Literal["frozen", "module"] = "frozen"
    predictive: str = "probit"
    scaling: dict[str, float]  # temperature, strength, temperature_alone
    family: FamilyRecord | None = None  # of probabilities, after the temperature
    confidence: str = "probs"  # or the family that says how often the label is right
    conformal: ConformalRecord
    quantile_levels: tuple[float, ...] = ()
    recalibration: str | None = None  # how they are made: emp, linear or kde
    ood: OodRecord | None = None
    abstain: AbstainRecord | None = None
    splits: SplitRecord
    data: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    renewal: RenewalRecord | None = None
    versions: dict[str, str] = {}
    notes: tuple[str, ...] = ()  # what the promises do not say, for a reader
    files: dict[str, FileRecord] = {}

    @property
    def alphas(self) -> tuple[float, ...]:
        """Levels the bundle was fitted for; the first is the default."""
        return tuple(g.alpha for g in self.conformal.guarantees)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle. ``files`` holds the verified bytes of each file, by name."""

    path: Path
    manifest: Manifest
    identity: str
    files: Mapping[str, bytes]

    def tensors(self, name: str) -> dict[str, Array]:
        """The named tensors of one safetensors file."""
        return dict(load_tensors(self.files[name]))

    @property
    def conformal_scores(self) -> dict[str, Array]:
        """Sorted conformal scores: ``set`` or ``interval``, ``signed``, and ``ood``."""
        return self.tensors(CONFORMAL)


def sha256(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def write_bundle(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write ``files`` and the manifest into a new folder, then verify it by loading it.

    The folder appears whole or not at all: it is written beside and renamed. Raises BundleError
    when ``path`` exists already, since a bundle is immutable.
    """
    if path.exists():
        raise BundleError(f"{path} exists already; a bundle is immutable, give another -o")
    records = {n: FileRecord(size=len(b), sha256=sha256(b)) for n, b in sorted(files.items())}
    text = manifest.model_copy(update={"files": records}).model_dump_json(indent=1) + "\n"
    part = path.parent / f".{path.name}.part-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        for name, data in {**files, MANIFEST: text.encode()}.items():
            with (part / name).open("xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        part.rename(path)
    finally:
        if part.exists():
            for p in part.iterdir():
                p.unlink()
            part.rmdir()
    return load_bundle(path)


def load_bundle(path: str | Path) -> Bundle:
    """Read and verify a bundle.

    Raises BundleError, naming the file, for: a missing or unreadable manifest, a newer schema, a
    file whose size or hash differs, a file that the manifest does not name, a symlink or anything
    that is not a plain file, a name that leaves the folder, an ONNX graph that refers to data
    outside itself.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"{path} is not a bundle: no such folder")
    text = _read_plain(path, MANIFEST, MAX_MANIFEST)
    manifest = parse_manifest(text, path)
    for name in manifest.files:
        if Path(name).name != name or name in {"", ".", "..", MANIFEST} or "\\" in name:
            raise BundleError(f"{path}: the manifest names {name!r}, a path outside the folder")
    for entry in sorted(p.name for p in path.iterdir()):
        if entry != MANIFEST and entry not in manifest.files:
            raise BundleError(f"{path}: {entry!r} is not named in the manifest; remove it")
    files: dict[str, bytes] = {}
    for name, record in manifest.files.items():
        data = _read_plain(path, name, record.size)
        if len(data) != record.size or sha256(data) != record.sha256:
            raise BundleError(
                f"{path}: {name} was changed after the bundle was written "
                f"(sha256 {sha256(data)[:12]}…, the manifest says {record.sha256[:12]}…)"
            )
        files[name] = data
    for name in (PREDICTOR, HEAD, STATE, CONFORMAL, REFERENCE, GOLDEN, EXAMPLES):
        if name not in files:
            raise BundleError(f"{path}: {name} is missing from the manifest")
    for name in (PREDICTOR, HEAD):
        if found := external_data(files[name]):
            raise BundleError(f"{path}: {name} refers to data outside itself ({found[0]!r})")
    return Bundle(path, manifest, sha256(text), files)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest from its JSON; BundleError for a newer schema or a wrong field, naming it."""
    try:
        version = json.loads(text).get("schema_version")
    except (ValueError, AttributeError, RecursionError) as e:
        raise BundleError(f"{path}: {MANIFEST} is not a JSON object ({e})") from None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version!r} is unknown here (this hedged reads "
            f"{SCHEMA_VERSION}); upgrade hedged to read it"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: {MANIFEST}: {where}: {first['msg']}") from None


def conformal_rank(n: int, alpha: float) -> int:
    """Rank of the conformal threshold among n scores, ``ceil((n+1)(1-alpha))``; n+1 if above n.

    Lei et al. 2018, "Distribution-free predictive inference for regression", eq. 4.
    """
    # Rounding first: (n+1)*(1-alpha) in floating point can land a hair above an integer.
    return min(n + 1, max(1, math.ceil(round((n + 1) * (1 - alpha), 9))))


def threshold_at(scores: Sequence[float] | Array, alpha: float) -> float:
    """The conformal threshold among ascending ``scores``; +inf when there are too few."""
    rank = conformal_rank(len(scores), alpha)
    return math.inf if rank > len(scores) else float(np.asarray(scores)[rank - 1])


def _read_plain(folder: Path, name: str, limit: int) -> bytes:
    """Bytes of a plain file, opened without following a symlink; at most ``limit`` + 1 of them."""
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        if (folder / name).is_symlink():
            raise BundleError(f"{folder}: {name} is a symlink; a bundle holds plain files") from e
        raise BundleError(f"{folder}: {name} cannot be read ({e.strerror})") from e
    with os.fdopen(fd, "rb") as f:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BundleError(f"{folder}: {name} is not a plain file")
        return f.read(limit + 1)
