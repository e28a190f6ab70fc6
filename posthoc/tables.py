"""Tables on disk, read in record batches of one size with bounded memory.

Parquet (a file, a folder of files, or a URL that pyarrow knows), CSV and ``.npz``. A batch holds
exactly as many rows as asked for, whatever the row groups or blocks of the file, so that a graph
sees the same batch shapes in every run.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from posthoc import arrays
from posthoc.contract import Array, DataError, HedgedError

_READ_BLOCK = 1 << 20
_CSV_BLOCK = 1 << 24
_WIDER = {"null": pa.int64(), "int64": pa.float64()}  # any other type widens to text
_MISFIT = re.compile(r"In CSV column #(\d+): .*?CSV conversion error to ([a-z0-9]+)")


def open_table(path: str | Path) -> Table:
    """Open a ``.parquet``, ``.csv`` or ``.npz`` file, a folder of Parquet files, or a Parquet URL.

    A folder is read in the order of its sorted ``*.parquet`` names, all with one schema. Raises
    DataError, naming the path, when it is missing, of another extension, damaged, or has no rows.
    """
    text = str(path)
    table: Table
    if "://" in text:
        table = _Parquet(text)
    else:
        where = Path(path)
        if not where.exists():
            raise DataError(f"{where}: no such file or folder")
        kinds: dict[str, type[Table]] = {".parquet": _Parquet, ".csv": _Csv, ".npz": _Npz}
        kind = _Parquet if where.is_dir() else kinds.get(where.suffix.lower())
        if kind is None:
            raise DataError(
                f"{where}: unknown extension {where.suffix!r}; give .parquet, .csv or .npz"
            )
        table = kind(text)
    if table.n_rows == 0:
        raise DataError(f"{text}: the table has no rows")
    return table


class Table(ABC):
    """A table of known columns and length; open one with `open_table`."""

    columns: tuple[str, ...]
    n_rows: int

    def __init__(self, path: str):
        self.path = path
        self._fs = pafs.LocalFileSystem()
        self._files = [path]

    def batches(
        self, size: int, columns: Sequence[str] | None = None, start: int = 0
    ) -> Iterator[pa.RecordBatch]:
        """Rows ``start``, ``start + 1``, … in batches of ``size``; only the last may be shorter.

        ``columns`` (default: all) are given in that order. Raises DataError for a column that
        does not exist and when the file turns out to be damaged half way.
        """
        if size < 1 or start < 0:
            raise DataError(f"batches of {size} rows from row {start} cannot be read")
        names = list(self.columns if columns is None else columns)
        for name in names:
            if name not in self.columns:
                raise DataError(
                    f"{self.path}: no column {name!r}; it has {', '.join(self.columns)}"
                )
        with _damage(self.path):
            yield from _rechunk(self._read(size, names, start), size)

    @abstractmethod
    def _read(self, size: int, columns: list[str], start: int) -> Iterator[pa.RecordBatch]:
        """Batches of any length that together hold the rows from ``start`` on."""

    def fingerprint(self) -> str:
        """Hex sha256 of the content: of the file's bytes, or of its files' sha256 in order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digests = []
        for name in self._files:
            digest = hashlib.sha256()
            with self._fs.open_input_file(name) as file:
                while block := file.read(_READ_BLOCK):
                    digest.update(block)
            digests.append(digest)
        if len(digests) == 1:
            return digests[0].hexdigest()
        return hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()


class _damage:  # noqa: N801  (a context manager, used like a function)
    """Turns what readers raise on a damaged file into a DataError that names it."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # zip, deflate, Parquet and CSV readers raise a dozen unrelated types between them.
        if isinstance(error, Exception) and not isinstance(error, HedgedError):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self.path}: cannot be read, damaged or cut off? ({first})"
            ) from error


def _rechunk(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly ``size``, but the last."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        at = 0
        while batch.num_rows - at >= size - count:
            held.append(batch.slice(at, size - count))
            at += size - count
            yield _joined(held)
            held, count = [], 0
        if at < batch.num_rows:
            held.append(batch.slice(at))
            count += batch.num_rows - at
    if held:
        yield _joined(held)


def _joined(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(parts) == 1:
        return parts[0]
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


class _Parquet(Table):
    def __init__(self, path: str):
        super().__init__(path)
        with _damage(path):
            root = path
            if "://" in path:
                self._fs, root = pafs.FileSystem.from_uri(path)
            info = self._fs.get_file_info(root)
            if info.type == pafs.FileType.NotFound:
                raise DataError(f"{path}: no such file or folder")
            if info.type == pafs.FileType.Directory:
                entries = self._fs.get_file_info(pafs.FileSelector(root))
                self._files = sorted(
                    e.path
                    for e in entries
                    if e.type == pafs.FileType.File
                    and e.base_name.endswith(".parquet")
                    and not e.base_name.startswith((".", "_"))
                )
                if not self._files:
                    raise DataError(f"{path}: no .parquet file in the folder")
            else:
                self._files = [root]
        self._rows: list[list[int]] = []  # rows of each row group of each file
        schema: pa.Schema | None = None
        for name in self._files:
            with _damage(name), self._open(name) as file:
                meta = file.metadata
                self._rows.append([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
                if schema is None:
                    schema = file.schema_arrow
                elif not file.schema_arrow.equals(schema):
                    raise DataError(
                        f"{name}: its columns differ from those of {self._files[0]}; "
                        "the files of a folder must have one schema"
                    )
        assert schema is not None
        self.columns = tuple(schema.names)
        if len(set(self.columns)) < len(self.columns):
            raise DataError(f"{path}: two columns have one name ({', '.join(self.columns)})")
        self.n_rows = sum(map(sum, self._rows))

    def _open(self, name: str) -> pq.ParquetFile:
        # By default a reader of batches holds every column chunk of the file at once.
        source = self._fs.open_input_file(name)
        return pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BLOCK)

    def _read(self, size: int, columns: list[str], start: int) -> Iterator[pa.RecordBatch]:
        skip = start
        for name, groups in zip(self._files, self._rows, strict=True):
            wanted: list[int] = []
            for index, rows in enumerate(groups):
                if not wanted and skip >= rows:
                    skip -= rows
                else:
                    wanted.append(index)
            if not wanted:
                continue
            with self._open(name) as file:
                for batch in file.iter_batches(size, row_groups=wanted, columns=columns):
                    if skip >= batch.num_rows:
                        skip -= batch.num_rows
                        continue
                    yield batch.select(columns).slice(skip)
                    skip = 0


class _Csv(Table):
    """Types are inferred from the first block of the file; where a later value does not fit, the
    column is widened one step and the file read again."""

    def __init__(self, path: str):
        super().__init__(path)
        self._types: dict[str, pa.DataType] = {}
        while True:
            try:
                with _damage(path), self._stream(None) as reader:
                    self.columns = tuple(reader.schema.names)
                    self.n_rows = sum(batch.num_rows for batch in reader)
                break
            except DataError as e:
                misfit = _MISFIT.search(str(e.__cause__))
                name = self.columns[int(misfit[1])] if misfit else ""
                if misfit is None or self._types.get(name) == pa.string():
                    raise
                self._types[name] = _WIDER.get(misfit[2], pa.string())
        if len(set(self.columns)) < len(self.columns):
            raise DataError(f"{path}: two columns have one name ({', '.join(self.columns)})")

    def _stream(self, columns: list[str] | None) -> pacsv.CSVStreamingReader:
        return pacsv.open_csv(
            self.path,
            read_options=pacsv.ReadOptions(block_size=_CSV_BLOCK),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(column_types=self._types, include_columns=columns),
        )

    def _read(self, size: int, columns: list[str], start: int) -> Iterator[pa.RecordBatch]:
        skip = start
        with self._stream(columns) as reader:
            for batch in reader:
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                yield batch.slice(skip)
                skip = 0


class _Npz(Table):
    """Arrays of one length, read a block of rows at a time from the archive's members."""

    def __init__(self, path: str):
        super().__init__(path)
        self._arrays: dict[str, arrays.Header] = {}
        with _damage(path), zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if not member.endswith(".npy"):
                    raise DataError(f"{path}: {member!r} is not an array")
                name = member.removesuffix(".npy")
                with archive.open(member) as file:
                    try:
                        self._arrays[name] = arrays.read_header(file, name)
                    except DataError as e:
                        raise DataError(f"{path}: {e}") from e
        lengths = {name: header.rows for name, header in self._arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{path}: arrays must have one length; they have {lengths}")
        self.columns = tuple(self._arrays)
        self.n_rows = next(iter(lengths.values()))

    def _read(self, size: int, columns: list[str], start: int) -> Iterator[pa.RecordBatch]:
        with zipfile.ZipFile(self.path) as archive:
            readers = [self._blocks(archive, name, size, start) for name in columns]
            for blocks in zip(*readers, strict=True):
                yield pa.record_batch([arrays.to_arrow(b) for b in blocks], names=columns)

    def _blocks(
        self, archive: zipfile.ZipFile, name: str, size: int, start: int
    ) -> Iterator[Array]:
        with archive.open(f"{name}.npy") as file:
            arrays.read_header(file, name)
            yield from arrays.read_rows(file, self._arrays[name], size, start)
