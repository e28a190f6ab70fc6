"""The input of a run, cut into fragments: the unit that is scored, committed and resumed.

A file is one fragment; a file of more than ``fragment_rows`` rows is cut at its groups. Where each
file is a row, the files of a folder are one source, and cut likewise. Names of outputs follow from
names of inputs alone, so every run over one input has the same fragments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import pyarrow as pa

from posthoc.contract import DataError
from service.scoring.formats.format import Filling, Format
from service.scoring.formats.registry import tables_among
from service.scoring.places import Place, files_below
from service.scoring.sources import Source, look_at

FRAGMENT_ROWS = 100_000


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
    """Columns that every file must have: the ``needed`` ones are read, the ``kept`` ones are copied
    to the output and must have one type throughout. ``filling`` are the columns of each input of
    the model."""

    needed: tuple[str, ...]
    kept: tuple[str, ...]
    filling: Filling = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listing:
    """Every file of the input by name, its fragments, and the schema of the first readable one,
    followed by the keys in its path."""

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
    columns: Callable[[Format, pa.Schema], Columns],
    fragment_rows: int = FRAGMENT_ROWS,
) -> Listing:
    """Files and fragments of a file, a folder with all its sub-folders, or a pattern, by name.

    ``columns`` chooses from the schema of the first readable file. Raises DataError for a missing
    place, an input without a readable file or of several formats, two fragments with one output
    name, and for a file that lacks a needed column or holds a kept one with another type than the
    first file does; ScoringError for a store that cannot be asked and a file that cannot be
    fetched. A needed column that a file lacks may be a key in its path, as Hive has them.
    """
    form, files = tables_among(files_below(place), place)
    sources: list[Source] = []
    first: tuple[pa.Schema, Columns] | None = None
    for source, schema in look_at(files, place, form):
        sources.append(source)
        if schema is not None:
            if first is None:
                first = _with_keys(schema, source), columns(form, schema)
            _check_columns(source, schema, *first)
    if first is None:
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
    return Listing(tuple(sources), tuple(fragments), *first)


def _with_keys(schema: pa.Schema, source: Source) -> pa.Schema:
    for key, _ in source.keys:
        schema = schema.append(pa.field(key, pa.string()))
    return schema


def _check_columns(source: Source, schema: pa.Schema, shared: pa.Schema, columns: Columns) -> None:
    keys = dict(source.keys)
    for name in dict.fromkeys((*columns.needed, *columns.kept)):
        count = schema.names.count(name)
        if name in keys:
            if name not in columns.kept:
                continue
            raise DataError(
                f"{source.place}: {name!r} is no column of the file but part of its path; the "
                "output keeps the folders below the input, where readers of partitioned data "
                "find it: leave it out of --passthrough"
            )
        if count != 1:
            has = f"it has {', '.join(schema.names)}" if not count else f"it has {count} of them"
            raise DataError(f"{source.place}: column {name!r} is needed; {has}")
    for name in columns.kept:
        have, want = schema.field(name).type, shared.field(name).type
        if have != want:
            raise DataError(
                f"{source.place}: column {name!r} is {have}, and {want} in the first file of the "
                "input; a column that is passed through must have one type"
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
    counts = [sum(source.groups[g] for g in part) for part in parts]
    fragments = []
    for index, (part, count, end) in enumerate(zip(parts, counts, accumulate(counts), strict=True)):
        suffix = "" if len(parts) == 1 else f"-{index:05d}-of-{len(parts):05d}"
        name = f"{source.stem}{suffix}.parquet"
        own = source
        if source.files:  # a fragment travels to its worker without the files of others
            own = replace(source, groups=(1,) * count, files=source.files[end - count : end])
        fragments.append(Fragment(own, tuple(part), end - count, count, name))
    return fragments
