"""The input of a run, cut into fragments: the unit that is scored, committed and resumed.

A file is one fragment; a file of more than ``fragment_rows`` rows is cut at its groups. Names of
outputs follow from names of inputs alone, so every run over one input has the same fragments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from posthoc.contract import DataError
from service.scoring.errors import ScoringError, first_line
from service.scoring.formats.format import Format
from service.scoring.formats.registry import FORMATS, tables_among
from service.scoring.places import Found, Place, files_below

FRAGMENT_ROWS = 100_000
_FETCH_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One input file; ``name`` is its POSIX path below the input folder, ``format`` the name of its
    format.

    ``groups`` holds the rows of each group that can be read by itself, and is None when the file
    cannot be read; ``problem`` then says why.
    """

    place: Place
    name: str
    size: int
    mtime_ns: int
    format: str
    groups: tuple[int, ...] | None = None
    problem: str = ""

    @property
    def rows(self) -> int | None:
        """Rows of the file; None when it cannot be read."""
        return None if self.groups is None else sum(self.groups)

    def check_unchanged(self) -> None:
        """Raise ScoringError when the file is gone or is no longer the one that was listed."""
        try:
            now = self.place.info()
        except OSError as e:
            raise ScoringError(f"input {self.place} cannot be asked for: {first_line(e)}") from e
        if now.type != pafs.FileType.File:
            raise ScoringError(f"input {self.place} vanished during the run")
        if (now.size, now.mtime_ns or 0) != (self.size, self.mtime_ns):
            raise ScoringError(
                f"input {self.place} changed during the run; start again with --overwrite"
            )

    def check_readable(self) -> None:
        """Raise ScoringError when the bytes of the file cannot be fetched, whatever they mean."""
        try:
            with self.place.open() as file:
                while file.read(_FETCH_BYTES):
                    pass
        except OSError as e:
            raise ScoringError(
                f"input {self.place} cannot be fetched: {first_line(e)}; run the same command "
                "again to go on"
            ) from e


@dataclass(frozen=True, slots=True)
class Fragment:
    """Groups ``groups`` of a source: ``rows`` rows, of which the first is ``first_row``.

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
        return tuple(s for s in self.sources if s.groups is None)

    @property
    def rows(self) -> int:
        """Rows of all files that can be read."""
        return sum(f.rows for f in self.fragments)


def list_fragments(
    place: Place,
    columns: Callable[[pa.Schema], Columns],
    fragment_rows: int = FRAGMENT_ROWS,
) -> Listing:
    """Files and fragments of a file, a folder with all its sub-folders, or a pattern, by name.

    ``columns`` chooses from the schema of the first readable file. Raises DataError for a missing
    place, an input without a readable file or of several formats, two fragments with one output
    name, and for a file that lacks a needed column or holds a kept one with another type than the
    first file does; ScoringError for a file whose bytes cannot be fetched.
    """
    form, files = tables_among(files_below(place), place)
    sources: list[Source] = []
    shared: pa.Schema | None = None
    wanted = Columns((), ())
    for file in files:
        source, schema = _look(file, form)
        sources.append(source)
        if schema is not None:
            if shared is None:
                shared, wanted = schema, columns(schema)
            _check_columns(file.place, schema, shared, wanted)
    if shared is None:
        raise DataError(f"{place}: no file can be read; {sources[0].name}: {sources[0].problem}")
    fragments = [f for s in sources for f in _cut(s, fragment_rows)]
    owners: dict[str, str] = {}
    for fragment in fragments:
        other = owners.setdefault(fragment.name, fragment.source.name)
        if other != fragment.source.name:
            raise DataError(
                f"{place}: {other} and {fragment.source.name} would both be scored into "
                f"{fragment.name}; rename one"
            )
    return Listing(tuple(sources), tuple(fragments), shared, wanted)


def _look(file: Found, form: Format) -> tuple[Source, pa.Schema | None]:
    told = (file.place, file.name, file.size, file.mtime_ns, form.name)
    try:
        layout = form.look(file.place)
    except (OSError, pa.ArrowException) as e:
        source = Source(*told, problem=first_line(e))
        source.check_readable()
        return source, None
    return Source(*told, groups=layout.groups), layout.schema


def _check_columns(path: Place, schema: pa.Schema, shared: pa.Schema, columns: Columns) -> None:
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
    """Consecutive groups, as many as stay within ``fragment_rows``, at least one."""
    if source.groups is None:
        return []
    parts: list[list[int]] = [[]]
    held = 0
    for group, rows in enumerate(source.groups):
        if parts[-1] and held + rows > fragment_rows:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += rows
    stem = FORMATS[source.format].stem(source.name)
    fragments, first = [], 0
    for index, part in enumerate(parts):
        count = sum(source.groups[g] for g in part)
        suffix = "" if len(parts) == 1 else f"-{index:05d}-of-{len(parts):05d}"
        fragments.append(Fragment(source, tuple(part), first, count, f"{stem}{suffix}.parquet"))
        first += count
    return fragments
