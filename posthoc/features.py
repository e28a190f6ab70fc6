"""The cached (φ, z, y) that every fit reads: one streaming pass of the frozen model.

A cache is a folder: ``z.npy`` and ``phi.npy`` (float32, mapped, never loaded whole), one
``rows-*.parquet`` for each finished shard, and ``meta.parquet`` once all are. A shard counts as
finished when its record is renamed into place, after its numbers have reached the disk; a build
that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from posthoc.contract import I64, Array, DataError, Features, ModelError, Task
from posthoc.data import Rows, Table, TableMapping, to_rows
from posthoc.frozen import Frozen, expose
from posthoc.runtime import open_session, planned_provider

CACHE_VERSION = 1
_SHARD_ROWS = 65_536
_SHARD_BYTES = 1 << 26
_META = "meta.parquet"


@dataclass(frozen=True)
class Cache:
    """What the frozen model made of N rows.

    ``phi`` N×D (None for a black box) and ``z`` N×C are float32 and mapped from disk; ``y`` is
    None without a target. Rows in ``bad`` hold zeros and are never to be used; ``bad`` says why,
    ``usable`` are the others, ascending. Hashes and ``groups`` as in `posthoc.data.Rows`.
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


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/hedged``, else ``~/.cache/hedged``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "hedged"


def estimated_bytes(frozen: Frozen, n_rows: int) -> int:
    """Size on disk of the cache of ``n_rows`` rows, within a few per cent."""
    return n_rows * (4 * sum(_widths(frozen).values()) + 32)


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
) -> Cache:
    """Run every row of ``table`` through ``frozen`` once and cache φ, z and y.

    The cache lies in a folder of ``cache_dir`` (default: `default_cache_dir`) whose name is a hash
    of the model, its tensors, the mapping, the table's content, ``batch_size`` and the provider.
    A complete cache is opened without running the model; finished shards of a killed build are
    kept. ``progress(done, total)`` counts rows. Raises DataError when the cache would take more
    than ``max_bytes`` or than the disk has, when the names in ``classes`` are not as many as the
    model's classes, and for what `to_rows` raises; ModelError when the model fails on a batch.
    """
    n_classes = max(2, frozen.z_dim) if task == "classification" else None
    if n_classes is not None and classes is not None and len(classes) != n_classes:
        raise DataError(f"{len(classes)} class names for a model with {n_classes} classes")
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = root / _key(frozen, table, mapping, task, classes, batch_size, device)
    if (cache := _open(path, frozen, table.n_rows)) is not None:
        if progress is not None:
            progress(table.n_rows, table.n_rows)
        return cache
    need = estimated_bytes(frozen, table.n_rows)
    if max_bytes is not None and need > max_bytes:
        raise DataError(
            f"the cache of {table.n_rows} rows takes {_size(need)}, more than the {_size(max_bytes)} "
            "allowed; raise --max-cache or give fewer rows"
        )
    path.mkdir(parents=True, exist_ok=True)
    held = sum(f.stat().st_blocks * 512 for f in path.iterdir())
    free = shutil.disk_usage(path).free
    if need - held > free:
        raise DataError(
            f"the cache of {table.n_rows} rows takes {_size(need)} and {path} has {_size(free)} "
            "left; free some space or choose another --cache"
        )
    shard = _shard_rows(frozen, batch_size)
    shards = -(-table.n_rows // shard)
    if not _arrays_fit(path, frozen, table.n_rows):
        for stale in path.iterdir():
            stale.unlink()
    columns = [c for c in mapping.columns(target=_has_target(table, mapping))]
    session = open_session(expose(frozen), device=device, threads=threads)
    names = list(_widths(frozen))
    tensors = [t for t in (frozen.phi, frozen.z) if t is not None]
    with _Writer(path, frozen, table.n_rows) as writer:
        for index in range(shards):
            start, stop = index * shard, min((index + 1) * shard, table.n_rows)
            if _record(path, index).exists():
                if progress is not None:
                    progress(stop, table.n_rows)
                continue
            parts: list[Rows] = []
            at = start
            for batch in table.batches(batch_size, columns, start):
                rows = to_rows(
                    batch,
                    mapping,
                    frozen.inputs,
                    task=task,
                    classes=classes,
                    n_classes=n_classes,
                )
                try:
                    values = session.run(tensors, rows.inputs)
                except Exception as e:  # kernels raise unrelated types
                    raise ModelError(
                        f"the model fails on rows {at}-{at + len(rows) - 1}: {e}"
                    ) from e
                writer.write(at, rows, dict(zip(names, values, strict=True)))
                parts.append(rows)
                at += len(rows)
                if progress is not None:
                    progress(at, table.n_rows)
                if at >= stop:
                    break
            writer.flush()
            _commit(_meta_table(parts), _record(path, index))
    records = [_record(path, index) for index in range(shards)]
    _commit(pa.concat_tables([pq.read_table(r) for r in records]), path / _META)
    cache = _open(path, frozen, table.n_rows)
    if cache is None:
        raise DataError(f"{path}: the cache was changed while it was written; run again")
    for record in records:
        record.unlink(missing_ok=True)
    return cache


def _widths(frozen: Frozen) -> dict[str, int]:
    """Array name -> its width: φ (unless a black box) and z."""
    phi = {} if frozen.head is None else {"phi": int(frozen.head.weight.shape[1])}
    return {**phi, "z": frozen.z_dim}


def _key(
    frozen: Frozen,
    table: Table,
    mapping: TableMapping,
    task: Task,
    classes: Sequence[str] | None,
    batch_size: int,
    device: str,
) -> str:
    """What the numbers depend on, hashed. Another batch size or provider rounds differently."""
    parts = {
        "version": [CACHE_VERSION, ort.__version__, planned_provider(device)],
        "model": [frozen.sha256, frozen.phi, frozen.z],
        "data": [table.fingerprint(), mapping.model_dump(), task, classes and list(classes)],
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _shard_rows(frozen: Frozen, batch_size: int) -> int:
    """Rows of a shard: whole batches, so that a resumed build sees the same batch shapes."""
    width = 4 * sum(_widths(frozen).values())
    return max(1, min(_SHARD_ROWS, _SHARD_BYTES // width) // batch_size) * batch_size


def _has_target(table: Table, mapping: TableMapping) -> bool:
    return bool(mapping.target) and set(mapping.target) <= set(table.columns)


def _record(path: Path, index: int) -> Path:
    return path / f"rows-{index:06d}.parquet"


def _arrays_fit(path: Path, frozen: Frozen, n_rows: int) -> bool:
    """Whether the arrays on disk are those of this cache, whole."""
    try:
        for name, width in _widths(frozen).items():
            array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if array.shape != (n_rows, width) or array.dtype != np.float32:
                return False
    except (OSError, ValueError, EOFError):
        return False
    return True


def _open(path: Path, frozen: Frozen, n_rows: int) -> Cache | None:
    """The complete cache in ``path``; None when there is none or it is damaged."""
    try:
        meta = pq.read_table(path / _META)
    except (OSError, pa.ArrowException):
        return None
    if meta.num_rows != n_rows or not _arrays_fit(path, frozen, n_rows):
        return None
    arrays = {n: np.load(path / f"{n}.npy", mmap_mode="r") for n in _widths(frozen)}
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


def _meta_table(parts: Sequence[Rows]) -> pa.Table:
    bad: list[str | None] = []
    for rows in parts:
        bad += [rows.bad.get(i) for i in range(len(rows))]
    columns = {
        "split_key": pa.array(np.concatenate([r.split_keys for r in parts])),
        "content_hash": pa.array(np.concatenate([r.content_hashes for r in parts])),
        "bad": pa.array(bad, pa.string()),
    }
    for name, values in (("y", [r.y for r in parts]), ("group", [r.groups for r in parts])):
        if all(v is not None for v in values):
            array: Any = np.concatenate([v for v in values if v is not None])
            columns[name] = (
                pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
                if array.ndim == 2
                else pa.array(array)
            )
    return pa.table(columns)


def _commit(table: pa.Table, path: Path) -> None:
    """Write beside, sync, rename: the file is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as f:
        pq.write_table(table, f)
        f.flush()
        os.fsync(f.fileno())
    part.rename(path)


class _Writer:
    """Writes blocks of rows into the arrays, which exist at their full size from the start.

    Plain writes and not a memory map: on a full disk a map ends the process by a signal.
    """

    def __init__(self, path: Path, frozen: Frozen, n_rows: int):
        self._files: dict[str, tuple[IO[bytes], int, int]] = {}  # file, offset of row 0, width
        for name, width in _widths(frozen).items():
            file = path / f"{name}.npy"
            if not file.exists():
                part = path / f".{name}.npy.{os.getpid()}"
                np.lib.format.open_memmap(part, "w+", np.float32, (n_rows, width)).flush()
                part.rename(file)
            offset = file.stat().st_size - n_rows * width * 4
            self._files[name] = (file.open("r+b", buffering=0), offset, width)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for file, _, _ in self._files.values():
            file.close()

    def write(self, start: int, rows: Rows, values: dict[str, Array]) -> None:
        """Rows from ``start`` on; those that are bad, or made so by NaN or Inf here, are zeroed."""
        for name, value in values.items():
            finite = np.isfinite(value).all(axis=1)
            for row in np.flatnonzero(~finite):
                rows.bad.setdefault(int(row), f"the model's {name} for it is NaN or Inf")
        gone = list(rows.bad)
        for name, value in values.items():
            file, offset, width = self._files[name]
            block = np.array(value, "<f4", order="C")
            block[gone] = 0
            file.seek(offset + start * width * 4)
            file.write(block.data)

    def flush(self) -> None:
        """Make what was written last."""
        for file, _, _ in self._files.values():
            os.fsync(file.fileno())
