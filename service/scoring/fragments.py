"""The input of a run, cut into fragments: the unit that is scored, committed and resumed.

A file is one fragment; a file of more than ``fragment_rows`` rows is cut at row groups. Names of
outputs follow from names of inputs alone, so every run over one input has the same fragments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from posthoc.contract import DataError
from service.scoring.errors import ScoringError

FRAGMENT_ROWS = 100_000


@dataclass(frozen=True, slots=True)
class Source:
    """One input file; ``name`` is its POSIX path below the input folder.

    ``row_groups`` holds the rows of each row group, and is None when the file cannot be read;
    ``problem`` then says why.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    row_groups: tuple[int, ...] | None = None
    problem: str = ""

    @property
    def rows(self) -> int | None:
        """Rows of the file; None when it cannot be read."""
        return None if self.row_groups is None else sum(self.row_groups)

    def check_unchanged(self) -> None:
        """Raise ScoringError when the file is gone or is no longer the one that was listed."""
        try:
            now = self.path.stat()
        except OSError as e:
            raise ScoringError(f"input {self.path} vanished during the run: {e.strerror}") from e
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ScoringError(
                f"input {self.path} changed during the run; start again with --overwrite"
            )


@dataclass(frozen=True, slots=True)
class Fragment:
    """Row groups ``groups`` of a source: ``rows`` rows, of which the first is ``first_row``.

    ``name`` is the POSIX path of the output below the output folder.
    """

    source: Source
    groups: tuple[int, ...]
    first_row: int
    rows: int
    name: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns that every file must have: the ``needed`` ones are read by the model, the ``kept``
    ones are copied to the output and must have one type throughout."""

    needed: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Every file of the input by name, its fragments, and the schema of the first readable one."""

    sources: tuple[Source, ...]
    fragments: tuple[Fragment, ...]
    schema: pa.Schema
    columns: Columns

    @property
    def unreadable(self) -> tuple[Source, ...]:
        """Files whose footer cannot be read, and which therefore have no fragments."""
        return tuple(s for s in self.sources if s.row_groups is None)

    @property
    def rows(self) -> int:
        """Rows of all files that can be read."""
        return sum(f.rows for f in self.fragments)


def list_fragments(
    path: str | Path,
    columns: Callable[[pa.Schema], Columns],
    fragment_rows: int = FRAGMENT_ROWS,
) -> Listing:
    """Files and fragments of a Parquet file, or of a folder with all its sub-folders, by name.

    Names that begin with ``_`` or ``.`` are left out, as Hive and Spark do; ``columns`` chooses
    from the schema of the first readable file. Raises DataError for a missing path, an input
    without a readable file, two fragments with one output name, and for a file that lacks a
    needed column or holds a kept one with another type than the first file does.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if root.is_file():
        files = [(root, root.name)]
    else:
        files = sorted(((p, p.relative_to(root).as_posix()) for p in _walk(root)), key=_by_name)
        if not files:
            raise DataError(f"{root}: no .parquet file in the folder")
    sources: list[Source] = []
    shared: pa.Schema | None = None
    wanted = Columns((), ())
    for file, name in files:
        source, schema = _open_source(file, name)
        sources.append(source)
        if schema is not None:
            if shared is None:
                shared, wanted = schema, columns(schema)
            _check_columns(file, schema, shared, wanted)
    if shared is None:
        raise DataError(f"{root}: no file can be read; {sources[0].name}: {sources[0].problem}")
    fragments = [f for s in sources for f in _cut(s, fragment_rows)]
    owners: dict[str, str] = {}
    for fragment in fragments:
        other = owners.setdefault(fragment.name, fragment.source.name)
        if other != fragment.source.name:
            raise DataError(
                f"{root}: {other} and {fragment.source.name} would both be scored into "
                f"{fragment.name}; rename one"
            )
    return Listing(tuple(sources), tuple(fragments), shared, wanted)


def _by_name(entry: tuple[Path, str]) -> str:
    return entry[1]


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith((".", "_"))]
        for name in names:
            if name.endswith((".parquet", ".pq")) and not name.startswith((".", "_")):
                yield Path(folder, name)


def _open_source(path: Path, name: str) -> tuple[Source, pa.Schema | None]:
    stat = path.stat()
    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
            groups = tuple(meta.row_group(g).num_rows for g in range(meta.num_row_groups))
            return Source(path, name, stat.st_size, stat.st_mtime_ns, groups), file.schema_arrow
    except (OSError, pa.ArrowException) as e:
        return Source(path, name, stat.st_size, stat.st_mtime_ns, problem=first_line(e)), None


def _check_columns(path: Path, schema: pa.Schema, shared: pa.Schema, columns: Columns) -> None:
    for name in dict.fromkeys((*columns.needed, *columns.kept)):
        count = schema.names.count(name)
        if count != 1:
            has = f"it has {', '.join(schema.names)}" if not count else f"it has {count} of them"
            raise DataError(f"{path}: column {name!r} is needed; {has}")
    for name in columns.kept:
        have, want = schema.field(name).type, shared.field(name).type
        if have != want:
            raise DataError(
                f"{path}: column {name!r} is {have}, and {want} in the first file of the input; "
                "a column that is passed through must have one type"
            )


def _cut(source: Source, fragment_rows: int) -> list[Fragment]:
    """Consecutive row groups, as many as stay within ``fragment_rows``, at least one."""
    if source.row_groups is None:
        return []
    parts: list[list[int]] = [[]]
    held = 0
    for group, rows in enumerate(source.row_groups):
        if parts[-1] and held + rows > fragment_rows:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += rows
    stem = source.name.removesuffix(".parquet").removesuffix(".pq")
    fragments, first = [], 0
    for index, part in enumerate(parts):
        count = sum(source.row_groups[g] for g in part)
        suffix = "" if len(parts) == 1 else f"-{index:05d}-of-{len(parts):05d}"
        fragments.append(Fragment(source, tuple(part), first, count, f"{stem}{suffix}.parquet"))
        first += count
    return fragments


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
