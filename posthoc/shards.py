"""The files of a cache: arrays written block by block, and records of finished shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posthoc.contract import I64, Array
from posthoc.data import Rows


def meta_table(blocks: Sequence[tuple[Rows, I64 | None]]) -> pa.Table:
    parts = [rows for rows, _ in blocks]
    bad: list[str | None] = []
    for rows in parts:
        bad += [rows.bad.get(i) for i in range(len(rows))]
    columns = {
        "split_key": pa.array(np.concatenate([r.split_keys for r in parts])),
        "content_hash": pa.array(np.concatenate([r.content_hashes for r in parts])),
        "bad": pa.array(bad, pa.string()),
    }
    for name, values in (
        ("y", [r.y for r in parts]),
        ("group", [r.groups for r in parts]),
        ("pixel", [pixels for _, pixels in blocks]),
    ):
        if all(v is not None for v in values):
            array: Any = np.concatenate([v for v in values if v is not None])
            columns[name] = (
                pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
                if array.ndim == 2
                else pa.array(array)
            )
    return pa.table(columns)


def commit(table: pa.Table, path: Path) -> None:
    """Write beside, sync, rename: the file is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as f:
        pq.write_table(table, f)
        f.flush()
        os.fsync(f.fileno())
    part.rename(path)


def allocate(path: Path, widths: Mapping[str, int], n_rows: int) -> None:
    """The arrays at their full size, as sparse files."""
    for name, width in widths.items():
        part = path / f".{name}.npy.part"
        np.lib.format.open_memmap(part, "w+", np.float32, (n_rows, width)).flush()
        part.rename(path / f"{name}.npy")


class Writer:
    """Writes blocks of rows into the arrays.

    Plain writes and not a memory map: on a full disk a map ends the process by a signal.
    """

    def __init__(self, path: Path, widths: Mapping[str, int], n_rows: int):
        self._files: dict[str, tuple[IO[bytes], int, int]] = {}  # file, start of row 0, its bytes
        for name, width in widths.items():
            file = path / f"{name}.npy"
            start = file.stat().st_size - n_rows * width * 4
            self._files[name] = (file.open("r+b"), start, width * 4)

    def __enter__(self) -> Writer:
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
            file, first, size = self._files[name]
            block = np.array(value, "<f4", order="C")
            block[gone] = 0
            file.seek(first + start * size)
            file.write(block.data)

    def flush(self) -> None:
        """Make what was written last."""
        for file, _, _ in self._files.values():
            file.flush()
            os.fsync(file.fileno())
