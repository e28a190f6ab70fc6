"""The files of an input, looked at once and known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from service.scoring.errors import ScoringError, first_line
from service.scoring.formats.format import Format
from service.scoring.formats.registry import FORMATS
from service.scoring.places import Found, Place

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


Looked = tuple[Source, pa.Schema | None]


def look_at(files: Sequence[Found], root: Place, form: Format) -> Iterator[Looked]:
    """The sources that files of one format make, each with the columns of its own; None for a file
    that cannot be read. Raises ScoringError for one that cannot be fetched."""
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
