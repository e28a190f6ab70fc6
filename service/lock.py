"""A file or a folder that one process holds. The lock is the kernel's and ends with the process,
however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posthoc.contract import HedgedError


@contextmanager
def locked(path: Path, held: HedgedError, *, make: bool = False) -> Iterator[None]:
    """Hold ``path``; with ``make`` it is a file, made where there is none.

    Raises ``held`` where another holds it, OSError where it cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise held from e
        yield
    finally:
        os.close(fd)
