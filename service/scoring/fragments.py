"""The input of a run, cut into fragments: the unit that is scored, committed and resumed.

A file is one fragment; a file of more than ``fragment_rows`` rows is cut at its groups. Where each
file is a row, the files of a folder are one source, and cut likewise. Names of outputs follow from
names of inputs alone, so every run over one input has the same fragments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from posthoc.contract import DataError
from service.scoring.errors import ScoringError, first_line
from service.scoring.formats.format import Filling, Format
from service.scoring.formats.registry import FORMATS, tables_among
from service.scoring.places import Found, Place, files_below

FRAGMENT_ROWS = 100_000
_FETCH_BYTES = 8 << 20
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Source:
    """One input file; ``name`` is its POSIX path below the input folder, ``format`` the name of its
    format.

    ``groups`` holds the rows of each group that can be read by itself, and is None when the file
    cannot be read; ``problem`` then says why. ``starts`` are byte offsets of the groups, where the
    format needs them. ``keys`` are names and values in the folders of its path, as Hive has them
    (``day=1/part.csv``), which are no columns of the file. Where each file is a row, a source is a
    folder, the input itself being ``.``; ``files`` are its rows (in a fragment, those of the
    fragment) and ``digest`` tells the names, sizes and times of all of them.
    """

    place: Place
    name: str
    size: int
    mtime_ns: int
    format: str
    groups: tuple[int, ...] | None = None
    problem: str = ""
    starts: tuple[int, ...] = ()
    keys: tuple[tuple[str, str | None], ...] = ()
    files: tuple[Found, ...] = ()
    digest: str | None = None

    @property
    def rows(self) -> int | None:
        """Rows of the file; None when it cannot be read."""
        return None if self.groups is None else sum(self.groups)

    @property
    def stem(self) -> str:
        """What the names of its outputs begin with."""
        if self.digest is not None:
            return "images" if self.name == "." else f"{self.name}/images"
        return FORMATS[self.format].stem(self.name) or self.name

    def check_unchanged(self) -> None:
        """Raise ScoringError when the file is gone or is no longer the one that was listed.

        It is known by its size and time of change. Object stores tell the second: one that is
        replaced within it by another of the same size is not noticed.
        """
        files = self._files()
        try:
            now = self.place.fs.get_file_info([f.place.path for f in files])
        except OSError as e:
            raise ScoringError(f"input {self.place} cannot be asked for: {first_line(e)}") from e
        for file, info in zip(files, now, strict=True):
            if info.type != pafs.FileType.File:
                raise ScoringError(f"input {file.place} vanished during the run")
            if (info.size, info.mtime_ns or 0) != (file.size, file.mtime_ns):
                raise ScoringError(
                    f"input {file.place} changed during the run; start again with --overwrite"
                )

    def check_readable(self) -> None:
        """Raise ScoringError when the bytes of the file cannot be fetched, whatever they mean."""
        for listed in self._files():
            try:
                with listed.place.open() as file:
                    while file.read(_FETCH_BYTES):
                        pass
            except OSError as e:
                raise ScoringError(
                    f"input {listed.place} cannot be fetched: {first_line(e)}; run the same "
                    "command again to go on"
                ) from e

    def _files(self) -> tuple[Found, ...]:
        if self.digest is not None:
            return self.files
        return (Found(self.place, self.name, self.size, self.mtime_ns),)


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
    looked = (
        _folders(files, place, form) if form.files_are_rows else (_look(f, form) for f in files)
    )
    sources: list[Source] = []
    first: tuple[pa.Schema, Columns] | None = None
    for source, schema in looked:
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


Looked = tuple[Source, pa.Schema | None]


def _looked(files: Sequence[Found], root: Place, form: Format) -> Iterator[Looked]:
    """Sources with their schemas, or None for one that cannot be read."""
    if form.files_are_rows:
        return _folders(files, root, form)
    return (_look(file, form) for file in files)


def _look(file: Found, form: Format, *, again: bool = True) -> Looked:
    source = Source(file.place, file.name, file.size, file.mtime_ns, form.name)
    try:
        layout = form.look(file.place)
    except (OSError, pa.ArrowException) as e:
        source.check_readable()
        if again and file.place.local is None:  # the store may have failed for a moment
            return _look(file, form, again=False)
        return replace(source, problem=first_line(e)), None
    keys = _keys(file.place.path, layout.schema)
    return replace(source, groups=layout.groups, starts=layout.starts, keys=keys), layout.schema


def _folders(
    files: Sequence[Found], root: Place, form: Format
) -> Iterator[tuple[Source, pa.Schema]]:
    """A source for each folder, of which every file is a row."""

    def folder(file: Found) -> str:
        return file.name.rpartition("/")[0]

    for name, rows in groupby(sorted(files, key=lambda f: (folder(f), f.name)), key=folder):
        members = tuple(rows)
        listed = "".join(f"{f.name}\0{f.size}\0{f.mtime_ns}\n" for f in members)
        schema = form.look(members[0].place).schema
        source = Source(
            root.below(name) if name else root,
            name or ".",
            sum(f.size for f in members),
            max(f.mtime_ns for f in members),
            form.name,
            groups=(1,) * len(members),
            keys=_keys(members[0].place.path, schema),
            files=members,
            digest=hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()[:32],
        )
        yield source, schema


def _keys(path: str, schema: pa.Schema) -> tuple[tuple[str, str | None], ...]:
    """Names and values in the folders of a path, but those that are columns of the file."""
    pairs = (part.partition("=") for part in path.split("/")[:-1])
    found = {unquote(key): unquote(value) for key, sign, value in pairs if key and sign}
    return tuple(
        (k, None if v == _NO_VALUE else v) for k, v in found.items() if k not in schema.names
    )


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
