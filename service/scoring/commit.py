"""The one way in which a file enters the output folder: whole, durable, and under its final name.

A file is written beside its place as ``.part-…``, flushed to the disk, and renamed; the rename is
the commit. What a killed run leaves behind is either a committed file or a part, and parts are
removed by the next run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from service.lock import locked as hold
from service.scoring.errors import ScoringError, first_line

PART = ".part-"


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turns the system's refusal to write ``what`` (disk full, read-only) into a ScoringError."""
    try:
        yield
    except OSError as e:
        raise ScoringError(
            f"cannot write {what}: {e.strerror or first_line(e)}; mend that and run the same "
            "command again, finished fragments are kept"
        ) from e


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path`` when the block ends well, and not at all otherwise."""
    # Two workers, of any machine, that were given the same fragment keep out of each other's part.
    part = path.parent / f"{PART}{secrets.token_hex(4)}-{path.name}"
    with writing(path):
        make_folder(path.parent)
        file = part.open("xb")
    try:
        yield file
        with writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            part.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # closing flushes once more what could not be written
            file.close()
        part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, if there is one, for good."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it, durably."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk: a rename survives a power cut only after this."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_parts(folder: Path) -> None:
    """Remove what a killed run left unfinished."""
    for part in folder.rglob(f"{PART}*"):
        part.unlink()


def locked(folder: Path) -> AbstractContextManager[None]:
    """Hold ``folder`` for one run. Raises ScoringError when another run holds it."""
    return hold(folder, ScoringError(f"{folder}: another run is writing here; wait for its end"))
