"""The cached (φ, z, y) that every fit reads: one streaming pass of the frozen model.

A cache is a folder: ``z.npy`` and ``phi.npy`` (float32, mapped, never loaded whole), one
``rows-*.parquet`` for each finished shard, and ``meta.parquet`` once all are. A shard counts as
finished when its record is renamed into place, after its numbers have reached the disk; a build
that was killed goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from posthoc import logits
from posthoc import rows as blocks_of
from posthoc.contract import I64, Array, DataError, Features, Task
from posthoc.data import Table, TableMapping
from posthoc.filling import ARRAYS, META, Pass, arrays_fit, fill, rows_at_once, unseen, widths
from posthoc.folds import Mapper
from posthoc.frozen import Frozen
from posthoc.pixels import PER_IMAGE, size
from posthoc.runtime import planned_provider

CACHE_VERSION = 3
_SHARD_ROWS = 65_536
_SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class Cache:
    """What the frozen model made of N rows.

    ``phi`` N×D (None for a black box) and ``z`` N×C are float32 and mapped from disk; ``y`` is
    None without a target. Rows in ``bad`` hold zeros and are never to be used; ``bad`` says why,
    ``usable`` are the others, ascending. Hashes and ``groups`` as in `posthoc.data.Rows`. Another
    process that is sent a cache maps the same files.
    """

    path: Path
    n_rows: int
    phi: Array | None
    z: Array
    y: Array | None
    groups: Array | None
    split_keys: NDArray[np.uint64]
    content_hashes: NDArray[np.uint64]
    bad: dict[int, str]
    per: int = 1  # rows of one item: pixels drawn from an image
    pixels: I64 | None = None  # of a dense model: which pixel of its image a row is

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[bool, dict[str, Any]]]:
        other = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _mapped, (self.phi is not None, other | {"phi": None, "z": None})

    @property
    def usable(self) -> I64:
        """Indices of the rows that are not bad."""
        keep = np.ones(self.n_rows, bool)
        keep[list(self.bad)] = False
        return np.flatnonzero(keep)

    def take(self, rows: I64) -> Features:
        """The given rows, in that order, copied into memory."""
        return Features(
            None if self.phi is None else np.asarray(self.phi[rows]),
            np.asarray(self.z[rows]),
            None if self.y is None else self.y[rows],
        )

    def blocks(self, rows: I64, size: int) -> Iterator[Features]:
        """The given rows, ``size`` at a time."""
        for at in range(0, len(rows), size):
            yield self.take(rows[at : at + size])

    def shared(self, rows: I64, link: logits.Link) -> blocks_of.Rows:
        """The given rows, outputs as logits, in shares that read them where they are used. Drawn
        pixels of an image are in one share."""
        size = blocks_of.SHARE // self.per * self.per or self.per
        shares = []
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            y = None if self.y is None else self.y[part]
            shares.append(Share(self.path, part, y, self.phi is not None, link))
        return blocks_of.shared(shares, len(rows))


@dataclass(frozen=True, slots=True)
class Share:
    """Some rows of the cache in ``path``. Their numbers and labels travel; φ and z are read by the
    process that it is called in, DataError where the folder is not seen from there."""

    path: Path
    rows: I64
    y: Array | None
    features: bool
    link: logits.Link

    def __call__(self) -> Iterator[Features]:
        """The rows, a block at a time."""
        try:
            arrays = [
                np.load(self.path / f"{n}.npy", mmap_mode="r") for n in ARRAYS[: 1 + self.features]
            ]
        except FileNotFoundError:
            raise unseen(self.path) from None
        for at in range(0, len(self.rows), blocks_of.BLOCK):
            part = slice(at, at + blocks_of.BLOCK)
            z, *phi = (np.asarray(a[self.rows[part]]) for a in arrays)
            y = None if self.y is None else self.y[part]
            yield Features(phi[0] if phi else None, logits.to_logits(z, self.link), y)


def _mapped(features: bool, parts: dict[str, Any]) -> Cache:
    """A cache that was sent from another process."""
    found = {n: np.load(parts["path"] / f"{n}.npy", mmap_mode="r") for n in ARRAYS[: 1 + features]}
    return Cache(**parts | found)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/hedged``, else ``~/.cache/hedged``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "hedged"


def estimated_bytes(frozen: Frozen, n_rows: int) -> int:
    """Size on disk of the cache of ``n_rows`` rows (or pixels), within a few per cent."""
    return n_rows * (4 * sum(widths(frozen).values()) + 32)


def build_cache(
    frozen: Frozen,
    table: Table,
    mapping: TableMapping,
    *,
    task: Task,
    classes: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    threads: int = 0,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    pixels: int = PER_IMAGE,
    mapper: Mapper | None = None,
) -> Cache:
    """Run every row of ``table`` through ``frozen`` once and cache φ, z and y.

    Of a dense model every row is an image, and ``pixels`` drawn pixels of it (two or more; all of
    them where its maps are known to be smaller) are cached, as so many rows in a row: see
    `posthoc.pixels`. Fewer than ``batch_size`` rows are run at a time where `posthoc.slices` says
    that what the model holds inside of them would fill the memory.

    The cache lies in a folder of ``cache_dir`` (default: `default_cache_dir`) whose name is a hash
    of the model, its tensors, the mapping, the table's content, ``batch_size`` and the provider.
    A complete cache is opened without running the model; finished shards of a killed build are
    kept. ``progress(done, total)`` counts rows. With a ``mapper`` its workers run the model, and
    write what it makes of their rows into the folder, which all of them have to see; the bytes are
    the same. Raises DataError when the cache would take more
    than ``max_bytes`` or than the disk has, when the names in ``classes`` are not as many as the
    model's classes, and for what `to_rows` raises; ModelError when the model fails on a batch.
    """
    n_classes = max(2, frozen.z_dim) if task == "classification" else None
    if n_classes is not None and classes is not None and len(classes) != n_classes:
        raise DataError(f"{len(classes)} class names for a model with {n_classes} classes")
    root = (Path(cache_dir) if cache_dir is not None else default_cache_dir()).absolute()
    per = 1 if frozen.dense is None else min(pixels, size(frozen.dense.spatial) or pixels)
    if frozen.dense is not None and per < 2:
        raise DataError(f"{per} pixels of an image are too few; draw two or more")
    path = root / _key(frozen, table, mapping, task, classes, batch_size, device, per)
    report = progress or (lambda done, total: None)
    cache = _open(path, frozen, table.n_rows, per)
    if cache is None:
        need = estimated_bytes(frozen, table.n_rows * per)
        _check_room(path, need, table.n_rows * per, max_bytes)
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            cache = _open(path, frozen, table.n_rows, per)
            if cache is None:
                given = Pass(
                    path,
                    frozen,
                    table,
                    mapping,
                    task,
                    None if classes is None else tuple(classes),
                    batch_size,
                    0,
                    per,
                    device,
                    threads,
                )
                given = dataclasses.replace(given, batch_size=rows_at_once(given))
                shard = _shard_rows(frozen, given.batch_size, per)
                fill(dataclasses.replace(given, shard=shard), report, mapper)
                cache = _open(path, frozen, table.n_rows, per)
    if cache is None:
        raise DataError(f"{path} was changed while it was written; remove it and run again")
    report(table.n_rows, table.n_rows)
    return cache


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One builder of a cache at a time; the kernel frees the lock of one that was killed."""
    import fcntl

    with (path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_room(path: Path, need: int, n_rows: int, max_bytes: int | None) -> None:
    if max_bytes is not None and need > max_bytes:
        raise DataError(
            f"the cache of {n_rows} rows takes {_size(need)}, more than the {_size(max_bytes)} "
            "allowed; raise --max-cache or give fewer rows"
        )
    held = sum(f.stat().st_blocks * 512 for f in path.glob("*")) if path.is_dir() else 0
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need - held > free:
        raise DataError(
            f"the cache of {n_rows} rows takes {_size(need)} and {there} has {_size(free)} left; "
            "free some space or choose another --cache"
        )


def _size(n: int) -> str:
    value, unit = float(n), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def _key(
    frozen: Frozen,
    table: Table,
    mapping: TableMapping,
    task: Task,
    classes: Sequence[str] | None,
    batch_size: int,
    device: str,
    per: int,
) -> str:
    """What the numbers depend on, hashed. Another batch size or provider rounds differently."""
    parts = {
        "version": [CACHE_VERSION, ort.__version__, planned_provider(device)],
        # Samples of a network are part of the graph, and not of the file that it came from.
        "model": [hashlib.sha256(frozen.model).hexdigest(), frozen.phi, frozen.z],
        "data": [table.fingerprint(), mapping.model_dump(), task, classes and list(classes)],
        "batch_size": batch_size,
        "pixels": None if frozen.dense is None else [per, dataclasses.astuple(frozen.dense)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _shard_rows(frozen: Frozen, batch_size: int, per: int) -> int:
    """Rows of a shard: whole batches, so that a resumed build sees the same batch shapes."""
    width = 4 * sum(widths(frozen).values())
    return max(1, min(_SHARD_ROWS, _SHARD_BYTES // width) // (batch_size * per)) * batch_size


def _open(path: Path, frozen: Frozen, items: int, per: int) -> Cache | None:
    """The complete cache in ``path``; None when there is none or it is damaged."""
    try:
        meta = pq.read_table(path / META)
    except (OSError, pa.ArrowException):
        return None
    n_rows = items * per
    if meta.num_rows != n_rows or not arrays_fit(path, frozen, n_rows):
        return None
    arrays = {n: np.load(path / f"{n}.npy", mmap_mode="r") for n in widths(frozen)}
    reasons = meta.column("bad").to_pylist()
    return Cache(
        path=path,
        n_rows=n_rows,
        phi=arrays.get("phi"),
        z=arrays["z"],
        y=_column(meta, "y"),
        groups=_column(meta, "group"),
        split_keys=meta.column("split_key").to_numpy(),
        content_hashes=meta.column("content_hash").to_numpy(),
        bad={row: reason for row, reason in enumerate(reasons) if reason is not None},
        per=per,
        pixels=_column(meta, "pixel"),
    )


def _column(meta: pa.Table, name: str) -> Array | None:
    if name not in meta.column_names:
        return None
    column = meta.column(name).combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        flat: Array = column.flatten().to_numpy()
        return flat.reshape(len(column), column.type.list_size)
    if pa.types.is_string(column.type):
        return np.asarray(column.to_pylist())
    return np.asarray(column.to_numpy())
