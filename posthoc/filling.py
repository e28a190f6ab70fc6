"""The pass of a frozen model over a table, whole shards at a time, into the files of a cache.

Shards know nothing of each other: which of them one process fills, and in which order, leaves the
bytes of the cache as they are. A shard is whole batches, so that the model sees the same ones.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq

from posthoc.contract import I64, Array, DataError, ModelError, Task
from posthoc.data import Rows, Table, TableMapping, to_rows
from posthoc.folds import Mapper, each
from posthoc.frozen import Frozen, expose
from posthoc.model.memory import row_bytes
from posthoc.pixels import sampled, target_shape
from posthoc.runtime import open_session
from posthoc.shards import Writer, allocate, commit, meta_table
from posthoc.slices import most_rows

ARRAYS = ("z", "phi")
META = "meta.parquet"
_BATCH_BYTES = 1 << 28  # inputs, φ and z of the images that are run at once
_SPANS = 8  # that a worker is given one after the other: progress is told after each


@dataclass(frozen=True)
class Pass:
    """What a cache is filled from; ``shard`` rows of the table have a record of their own."""

    path: Path
    frozen: Frozen
    table: Table
    mapping: TableMapping
    task: Task
    classes: tuple[str, ...] | None
    batch_size: int
    shard: int
    per: int  # rows of the cache for one of the table
    device: str
    threads: int

    def record(self, index: int) -> Path:
        """The file that says that a shard is finished."""
        return self.path / f"rows-{index:06d}.parquet"

    @property
    def n_shards(self) -> int:
        """Shards of the whole table."""
        return -(-self.table.n_rows // self.shard)

    def rows_of(self, shards: int) -> int:
        """Rows of the first shards."""
        return min(shards * self.shard, self.table.n_rows)


class Filler:
    """Fills shards, the model opened once; what is sent to another process is the `Pass` alone."""

    def __init__(self, given: Pass):
        self.given = given
        self._session: Any = None

    def __reduce__(self) -> tuple[type[Filler], tuple[Pass]]:
        return Filler, (self.given,)

    def __call__(self, shards: range) -> int:
        """Fill some shards in a process that may run on another machine; the rows of them.

        Raises DataError where the folder of the cache or the table is not seen from there.
        """
        table = self.given.table.path
        if not (self.given.path / "z.npy").is_file():
            raise unseen(self.given.path)
        if "://" not in table and not Path(table).exists():
            raise DataError(
                f"the worker on {socket.gethostname()} does not see {table}: put the rows where "
                "all workers can read them"
            )
        return self.fill(shards)

    def fill(self, shards: range, report: Callable[[int], None] | None = None) -> int:
        """The same here; ``report`` is told after each batch how many rows of them are done. Shards
        at the beginning that have a record, by a worker that was lost, are left as they are."""
        given, n_rows = self.given, self.given.table.n_rows
        first, end = given.rows_of(shards.start), given.rows_of(shards.stop)
        start = next((s for s in shards if not given.record(s).exists()), shards.stop)
        at = given.rows_of(start)
        if at == end:
            return end - first
        columns = given.mapping.columns(target=self.labelled)
        done: list[tuple[Rows, I64 | None]] = []
        with Writer(given.path, widths(given.frozen), n_rows * given.per) as writer:
            for batch in given.table.batches(given.batch_size, columns, at):
                rows = self.read(batch)
                size = len(rows)
                rows, made, which = self._shrunk(rows, self.run(rows, at))
                writer.write(at * given.per, rows, made)
                done.append((rows, which))
                at += size
                if at % given.shard == 0 or at == n_rows:
                    writer.flush()
                    commit(meta_table(done), given.record((at - 1) // given.shard))
                    done = []
                if report is not None:
                    report(at - first)
                if at >= end:
                    break
        if at < end:
            raise DataError(f"{given.table.path}: {at} rows could be read of {n_rows}")
        return end - first

    def read(self, batch: pa.RecordBatch) -> Rows:
        """A batch of the table as tensors, with its labels where it has a column of them."""
        given, frozen = self.given, self.given.frozen
        maps = None
        if frozen.dense is not None:
            maps = target_shape(frozen.dense, given.task, frozen.z_dim)
        return to_rows(
            batch,
            given.mapping,
            frozen.inputs,
            task=given.task if self.labelled else None,
            classes=given.classes,
            n_classes=max(2, frozen.z_dim) if given.task == "classification" else None,
            maps=maps,
        )

    @property
    def labelled(self) -> bool:
        """Whether the table has the columns of the target."""
        target = self.given.mapping.target
        return bool(target) and set(target) <= set(self.given.table.columns)

    def run(self, rows: Rows, at: int) -> dict[str, Array]:
        """φ and z of a batch that begins at row ``at``; ModelError, naming its rows."""
        given, frozen = self.given, self.given.frozen
        if frozen.dense is not None and len(rows.bad) == len(rows):
            return _nothing(frozen, len(rows))  # nothing says what size such images have
        if self._session is None:
            self._session = open_session(expose(frozen), device=given.device, threads=given.threads)
        tensors = {"phi": frozen.phi, "z": frozen.z}
        names = list(widths(frozen))
        try:
            values = self._session.run([tensors[n] for n in names], rows.inputs)
        except Exception as e:  # kernels raise unrelated types
            raise ModelError(
                f"the model fails on rows {at} to {at + len(rows) - 1} of {given.table.path}: {e}"
            ) from e
        return dict(zip(names, map(np.asarray, values), strict=True))

    def _shrunk(
        self, rows: Rows, values: dict[str, Array]
    ) -> tuple[Rows, dict[str, Array], I64 | None]:
        """Rows of a batch as they are cached, their values, and which pixels they are."""
        dense = self.given.frozen.dense
        if dense is None:
            return rows, values, None
        return sampled(rows, values, dense, self.given.task, self.given.per)


def unseen(cache: Path) -> DataError:
    """What is said where a worker does not have the folder of a cache."""
    return DataError(
        f"the worker on {socket.gethostname()} does not see {cache}: workers on several machines "
        "share one cache; give --cache a folder that all of them have"
    )


def rows_at_once(given: Pass) -> int:
    """Rows that are run at once: as many as memory holds, by the first good one."""
    filler, dense = Filler(given), given.frozen.dense is not None
    columns = given.mapping.columns(target=filler.labelled)
    for at, batch in enumerate(given.table.batches(1, columns)):
        if (one := filler.read(batch)).bad:
            continue
        most = most_rows(row_bytes(onnx.load_from_string(expose(given.frozen)), one.inputs))
        if dense:
            held = sum(a.nbytes for a in (*one.inputs.values(), *filler.run(one, at).values()))
            most = min(most, _BATCH_BYTES // held)
        return max(1, min(given.batch_size, most))
    return given.batch_size


def fill(given: Pass, report: Callable[[int, int], None], mapper: Mapper | None) -> None:
    """Run the rows of every shard that has no record yet, then join the records."""
    n_rows, filler = given.table.n_rows, Filler(given)
    records = [given.record(i) for i in range(given.n_shards)]
    if not arrays_fit(given.path, given.frozen, n_rows * given.per):
        for record in records:
            record.unlink(missing_ok=True)
        allocate(given.path, widths(given.frozen), n_rows * given.per)
    missing = _missing(records)
    done = n_rows - sum(given.rows_of(i + 1) - given.rows_of(i) for i in missing)
    report(done, n_rows)
    if mapper is None:
        for span in spans(missing, len(missing)):
            done += filler.fill(span, partial(_told, report, done, n_rows))
    else:
        most = -(-len(missing) // (mapper.workers * _SPANS))
        for rows in each(mapper, filler, spans(missing, most)):
            done += rows
            report(done, n_rows)
        if lost := _missing(records):
            raise DataError(
                f"{records[lost[0]]} was written by a worker and is not here: workers on several "
                "machines share one cache; give --cache a folder that all of them have"
            )
    commit(pa.concat_tables([pq.read_table(r) for r in records]), given.path / META)
    for record in records:
        record.unlink()


def _told(report: Callable[[int, int], None], before: int, total: int, rows: int) -> None:
    report(before + rows, total)


def _missing(records: Sequence[Path]) -> list[int]:
    """Those that are not there, in ascending order."""
    # A network file system answers this anew, where `exists` may go by what it said before.
    there = {path.name for path in records[0].parent.iterdir()}
    return [i for i, r in enumerate(records) if r.name not in there]


def spans(shards: Sequence[int], most: int) -> list[range]:
    """Ascending shards as runs of neighbours, of at most ``most``: each is one pass over rows."""
    found: list[range] = []
    for shard in shards:
        last = found[-1] if found else range(0)
        if found and shard == last.stop and len(last) < most:
            found[-1] = range(last.start, shard + 1)
        else:
            found.append(range(shard, shard + 1))
    return found


def widths(frozen: Frozen) -> dict[str, int]:
    """Array name -> its width: φ (unless a black box) and z."""
    phi = {} if frozen.width is None else {"phi": frozen.width}
    return {**phi, "z": frozen.z_dim}


def arrays_fit(path: Path, frozen: Frozen, n_rows: int) -> bool:
    """Whether the arrays on disk are those of this cache, whole."""
    try:
        for name, width in widths(frozen).items():
            array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if array.shape != (n_rows, width) or array.dtype != np.float32:
                return False
    except (OSError, ValueError, EOFError):
        return False
    return True


def _nothing(frozen: Frozen, n: int) -> dict[str, Array]:
    """Maps of one pixel and zeros, for images that are all bad."""
    assert frozen.dense is not None
    axes = {"z": frozen.dense.axis, "phi": frozen.dense.phi_axis}
    one = (1,) * len(frozen.dense.spatial)
    shapes = {
        name: one if axes[name] is None else (width, *one) if axes[name] == 1 else (*one, width)
        for name, width in widths(frozen).items()
    }
    return {name: np.zeros((n, *shape), np.float32) for name, shape in shapes.items()}
