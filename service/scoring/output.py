"""Where a run writes: a folder of this machine, or a prefix of an object store.

Either takes a whole file or none of it, and that is the commit.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from service.scoring import commit
from service.scoring.commit import PART, writing
from service.scoring.errors import ScoringError, first_line
from service.scoring.places import Place

_COPY_BYTES = 8 << 20


class Output(Protocol):
    """Files by their POSIX path below one root; ``text`` is what the user calls it.

    Everything raises ScoringError where the system refuses to write, except for ``open``. An
    output can be pickled, and is the same place on another machine that sees it.
    """

    @property
    def text(self) -> str:
        """What the user calls it."""

    def make(self) -> None:
        """Make the root, where a store has such a thing."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold the root for one run, where the system can: object stores cannot."""

    def names(self) -> list[str]:
        """Every file, parts of killed runs excepted."""

    def bare(self) -> bool:
        """Whether nothing is there, parts of killed runs excepted."""

    def open(self, name: str) -> pa.NativeFile:
        """A file, for reading. Raises OSError, FileNotFoundError where there is none."""

    def new_file(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file that appears under its name when the block ends well, and else not at all."""

    def remove(self, *names: str) -> None:
        """Remove those of the files that are there, for good."""

    def tidy(self) -> None:
        """Remove what killed runs left unfinished, and folders that hold nothing."""


def open_output(place: Place) -> Output:
    """The output at a place."""
    return Objects(place) if place.local is None else Folder(place.text, place.local)


def write_file(output: Output, name: str, data: bytes) -> None:
    """Commit a small file."""
    with output.new_file(name) as file, writing(f"{output.text}/{name}"):
        file.write(data)


def has(output: Output, name: str) -> bool:
    """Whether there is a file of that name. Raises ScoringError when nobody can tell."""
    try:
        output.open(name).close()
    except FileNotFoundError:
        return False
    except OSError as e:
        raise ScoringError(
            f"{output.text}/{name} cannot be read: {first_line(e)}; run the same command again"
        ) from e
    return True


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder: a file is written beside its place, flushed, and renamed."""

    text: str
    path: Path

    def make(self) -> None:
        with writing(self.path):
            commit.make_folder(self.path)

    def locked(self) -> AbstractContextManager[None]:
        return commit.locked(self.path)

    def names(self) -> list[str]:
        every = (p for p in self.path.rglob("*") if p.is_file() and not p.name.startswith(PART))
        return sorted(p.relative_to(self.path).as_posix() for p in every)

    def bare(self) -> bool:
        return all(p.name.startswith(PART) for p in self.path.iterdir())

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.path / name))

    def new_file(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return commit.new_file(self.path / name)

    def remove(self, *names: str) -> None:
        for name in names:
            with writing(self.path / name):
                commit.remove(self.path / name)

    def tidy(self) -> None:
        with writing(self.path):
            commit.remove_parts(self.path)
            for path in sorted((p for p in self.path.rglob("*") if p.is_dir()), reverse=True):
                if not any(path.iterdir()):
                    path.rmdir()


@dataclass(frozen=True, slots=True)
class Objects:
    """A prefix of an object store: a file is made whole on this machine, then put.

    The store shows an object once all of it has arrived; what a killed upload leaves is seen by
    nobody, and goes where the bucket has a rule for unfinished uploads. A prefix cannot be held: of
    two runs that write to one at once, both write the same bytes if they are the same run, and
    `begin` refuses another one.
    """

    place: Place

    @property
    def text(self) -> str:
        return self.place.text

    def make(self) -> None:
        """Nothing: a prefix is there when an object is."""

    def locked(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def names(self) -> list[str]:
        root = self.place.path
        with writing(self.text):
            selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
            infos = self.place.fs.get_file_info(selector)
        files = (i for i in infos if i.type == pafs.FileType.File)
        return sorted(i.path[len(root) :].lstrip("/") for i in files)

    def bare(self) -> bool:
        return not self.names()

    def open(self, name: str) -> pa.NativeFile:
        return self.place.below(name).open()

    @contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        place = self.place.below(name)
        with writing(f"a temporary file for {place}"):
            file: IO[Any] = tempfile.TemporaryFile()  # noqa: SIM115  (closed at the end)
        with file:
            yield file
            with writing(f"a temporary file for {place}"):
                size = file.seek(0, 2)
                file.seek(0)
            with writing(place):
                out = place.fs.open_output_stream(place.path)
                try:
                    shutil.copyfileobj(file, out, _COPY_BYTES)
                except BaseException:
                    # A stream has no other end than to put what it was given.
                    with contextlib.suppress(OSError):
                        out.close()
                        place.fs.delete_file(place.path)
                    raise
                out.close()
                arrived = place.info().size
                if arrived != size:
                    raise OSError(f"{arrived} of {size} bytes arrived")

    def remove(self, *names: str) -> None:
        for name in names:
            place = self.place.below(name)
            with writing(place):
                if place.info().type == pafs.FileType.File:
                    place.fs.delete_file(place.path)

    def tidy(self) -> None:
        """Nothing: what was never put whole is not there."""
