"""Files of installed packages as rows for magika, the frozen file-type classifier of the demo.

The truth of a file is its extension (``sources.TRUTH``). Half of the files are cut to their first
1,024 bytes, as a scanner sees them that reads a prefix: that is the mix this deployment meets.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hedged.demo.sources import (
    DISTRIBUTIONS,
    MAGIKA,
    STRANGE,
    TEMPLATED,
    TRUTH,
    requirements,
)
from posthoc.contract import HedgedError

PREFIX = 1024  # bytes kept of a cut file
SIDE = 1024  # bytes that magika reads at each end
BLOCK = 4096  # bytes within which magika strips white space
PADDING = 256
MIN_BYTES = 8  # magika answers by rule, not by model, below this (min_file_size_for_dl)
CLASS_CAP = 700
STRANGE_CAP = 80
MODEL = "magika/models/standard_v3_3/model.onnx"
CONFIG = "magika/models/standard_v3_3/config.min.json"


@dataclass(frozen=True, slots=True)
class CorpusPaths:
    """The two tables and what is in them.

    ``train`` has columns file (str), label (str), truncated (bool), bytes (int32[2048]); ``ood``
    has type in place of label. ``classes`` are the 214 labels in the order of magika's outputs;
    ``counts`` and ``ood_counts`` are rows by label and by type.
    """

    train: Path
    ood: Path
    n_rows: int
    n_ood: int
    classes: tuple[str, ...]
    counts: dict[str, int]
    ood_counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Row:
    digest: bytes  # sha256 of the whole file
    file: str
    kind: str
    truncated: bool
    bytes: NDArray[np.int32]


def magika_model() -> Path:
    """The ONNX file of the installed magika (Apache-2.0); magika itself is never imported.

    Takes int32 ``bytes`` [N, 2048], gives softmax probabilities ``target_label`` [N, 214]. Raises
    HedgedError with the command that installs it.
    """
    return _magika_file(MODEL)


def magika_labels() -> tuple[str, ...]:
    """The 214 file types, in the order of the model's outputs."""
    config = json.loads(_magika_file(CONFIG).read_bytes())
    return tuple(config["target_labels_space"])


def magika_input(data: bytes) -> NDArray[np.int32]:
    """The 2,048 numbers that magika makes of a file (``_extract_features_from_seekable``).

    The first 1,024 bytes after leading white space, padded at the right, then the last 1,024
    before trailing white space, padded at the left; each taken within one block of 4,096 bytes.
    Files that are shorter than 8 bytes after leading white space never reach the model.
    """
    start = data[:BLOCK].lstrip()[:SIDE]
    end = data[-BLOCK:].rstrip()[-SIDE:]
    out = np.full(2 * SIDE, PADDING, np.int32)
    out[: len(start)] = np.frombuffer(start, np.uint8)
    out[2 * SIDE - len(end) :] = np.frombuffer(end, np.uint8)
    return out


def build_corpus(
    out: Path, *, share: float = 1.0, progress: Callable[[str], None] | None = None
) -> CorpusPaths:
    """Write ``train.parquet`` and ``ood.parquet`` into ``out``; same packages, same bytes.

    Each file appears once (equal contents, or equal model inputs, count as one), at most
    ``CLASS_CAP`` of a label and ``STRANGE_CAP`` of a strange type, or a ``share`` of these, chosen
    and ordered by content hash. Raises HedgedError naming the packages that are missing and the
    command for them.
    """
    say = progress or (lambda _: None)
    labels = magika_labels()
    known_strange(labels)
    pools: dict[str, dict[bytes, tuple[str, bytes]]] = {}
    for dist in _distributions(say):
        for file, data in _files(dist):
            kind = type_of(file, data)
            if kind is not None:
                pools.setdefault(kind, {}).setdefault(_digest(data), (file, data))
    rows = _unique(pools, share)
    known = [r for r in rows if r.kind not in STRANGE]
    strange = [r for r in rows if r.kind in STRANGE]
    out.mkdir(parents=True, exist_ok=True)
    say(f"writing {len(known)} rows and {len(strange)} strange ones")
    train, ood = out / "train.parquet", out / "ood.parquet"
    _write(train, known, "label")
    _write(ood, strange, "type")
    return CorpusPaths(
        train=train,
        ood=ood,
        n_rows=len(known),
        n_ood=len(strange),
        classes=labels,
        counts=dict(Counter(r.kind for r in known).most_common()),
        ood_counts=dict(Counter(r.kind for r in strange).most_common()),
    )


def type_of(file: str, data: bytes) -> str | None:
    """The magika label, else the strange type, of a file; None where the name does not settle it.

    None too for what magika answers without its model, for templates, and for YAML that is JSON
    as well: they have no single true type.
    """
    if len(data[:BLOCK].lstrip()) < MIN_BYTES:
        return None
    suffix = PurePosixPath(file).suffix.lower()
    for kind, strange in STRANGE.items():
        if suffix in strange.suffixes and data.startswith(strange.starts or b""):
            return kind
    label = TRUTH.get(suffix)
    if label in TEMPLATED and (b"{%" in data or b"{{" in data):
        return None
    if label == "yaml" and _is_json(data):
        return None
    return label


def known_strange(labels: tuple[str, ...]) -> None:
    """Raise HedgedError if a type that the demo calls strange is one of the model's labels."""
    clash = sorted(set(STRANGE) & set(labels) | {s for s in TRUTH if s in _strange_suffixes()})
    if clash:
        raise HedgedError(f"the demo calls {', '.join(clash)} strange, but the model knows it")


def _strange_suffixes() -> set[str]:
    return {s for strange in STRANGE.values() for s in strange.suffixes}


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _unique(pools: dict[str, dict[bytes, tuple[str, bytes]]], share: float) -> list[_Row]:
    """The capped rows of every type in the order of their hash, no model input twice."""
    rows: list[_Row] = []
    seen: set[bytes] = set()
    for kind, pool in sorted(pools.items()):
        left = math.ceil(share * (STRANGE_CAP if kind in STRANGE else CLASS_CAP))
        for digest, (file, data) in sorted(pool.items()):
            cut = digest[-1] % 2 == 1 and len(data) > PREFIX
            x = magika_input(data[:PREFIX] if cut else data)
            # Cut files may share their whole prefix, such as a licence.
            if left == 0 or x.tobytes() in seen:
                continue
            seen.add(x.tobytes())
            rows.append(_Row(digest, file, kind, cut, x))
            left -= 1
    return sorted(rows, key=lambda r: r.digest)


def _write(path: Path, rows: list[_Row], kind: str) -> None:
    flat = pa.array(np.concatenate([r.bytes for r in rows]))
    table = pa.table(
        {
            "file": pa.array([r.file for r in rows]),
            kind: pa.array([r.kind for r in rows]),
            "truncated": pa.array([r.truncated for r in rows]),
            "bytes": pa.FixedSizeListArray.from_arrays(flat, 2 * SIDE),
        }
    )
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    pq.write_table(table, part, compression="zstd", row_group_size=1024)
    part.replace(path)


def _distributions(say: Callable[[str], None]) -> list[metadata.Distribution]:
    found: list[metadata.Distribution] = []
    missing: list[str] = []
    for name, version in DISTRIBUTIONS.items():
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name}=={version}")
            continue
        if dist.version != version:
            say(f"{name} is {dist.version}, not {version}: the figures may differ a little")
        found.append(dist)
    if missing:
        raise HedgedError(
            f"the demo reads files of {len(missing)} packages that are not installed. "
            f"Install them with: pip install --no-deps {' '.join(missing)}"
        )
    return found


def _files(dist: metadata.Distribution) -> Iterator[tuple[str, bytes]]:
    """Package-relative name and content of each installed file that could be a row."""
    suffixes = set(TRUTH) | _strange_suffixes()
    for file in dist.files or ():
        # What pip or uv writes differs between them: metadata, byte code, files outside the folder.
        top = file.parts[0]
        if top == ".." or top.endswith(".dist-info") or "__pycache__" in file.parts:
            continue
        path = Path(str(dist.locate_file(file)))
        if file.suffix.lower() in suffixes and path.is_file():
            yield file.as_posix(), path.read_bytes()


def _magika_file(name: str) -> Path:
    try:
        path = Path(str(metadata.distribution("magika").locate_file(name)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise HedgedError(
            f"the demo's model is part of magika {MAGIKA}. Install it with: "
            f"pip install --no-deps magika=={MAGIKA} (alone: its own dependency onnxruntime "
            "must not be installed beside onnxruntime-gpu)"
        )
    return path


__all__ = [
    "CorpusPaths",
    "build_corpus",
    "known_strange",
    "magika_input",
    "magika_labels",
    "magika_model",
    "requirements",
    "type_of",
]
