"""Where ledger entries wait on local disk while the store is away: fsynced JSON lines."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Entry = dict[str, Any]
_TOGETHER, _TOGETHER_BYTES = 200, 1 << 20  # entries replayed at once


class SpoolFullError(OSError):
    """The spool has reached its bound."""


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
    done: int = 0  # bytes already replayed


class Spool:
    """An append-only queue of entries in segment files that survive a crash.

    A segment is locked (flock) by the process that writes it, so that another process may adopt
    the segments of a dead one. ``key`` names the ledger, so that ledgers may share a folder.
    """

    def __init__(self, folder: Path, key: str, *, max_bytes: int = 1 << 30) -> None:
        self._folder = folder
        self._key = key
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._active: _Segment | None = None
        self._sealed: list[_Segment] = []
        self._bytes = 0

    @property
    def pending(self) -> bool:
        """Whether anything waits here to be replayed."""
        return self._active is not None or bool(self._sealed)

    def append(self, entry: Entry) -> None:
        """Keep an entry; it is on disk when this returns. Raises OSError when it cannot be."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._bytes + len(line) > self._max_bytes:
                raise SpoolFullError(f"the ledger spool {self._folder} holds {self._bytes} bytes")
            segment = self._active or self._create()
            start = os.lseek(segment.fd, 0, os.SEEK_END)
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(segment.fd, view) :]
                os.fsync(segment.fd)
            except OSError:
                os.ftruncate(segment.fd, start)  # half a line must not precede a whole one
                raise
            self._bytes += len(line)

    def adopt(self) -> None:
        """Take over the segments that processes now dead have left."""
        with self._lock:
            mine = {s.path for s in (*self._sealed, *([self._active] if self._active else []))}
            for path in sorted(self._folder.glob(f"{self._key}-*.jsonl")):
                if path not in mine and (segment := _lock(path)) is not None:
                    self._sealed.append(segment)
                    self._bytes += os.fstat(segment.fd).st_size

    def replay(self, apply: Callable[[list[Entry]], None], seconds: float = math.inf) -> None:
        """Give the entries to ``apply``, a few at a time and oldest first; remove what was applied.

        An exception from ``apply`` ends the replay, and so does the time; the next one goes on
        with the same entries.
        """
        end = time.monotonic() + seconds
        while (segment := self._next()) is not None:
            with os.fdopen(os.dup(segment.fd), "rb") as f:
                f.seek(segment.done)
                while lines := _some(f):
                    found = (_entry(line, segment.path) for line in lines)
                    if entries := [entry for entry in found if entry is not None]:
                        apply(entries)
                    segment.done += sum(map(len, lines))
                    if time.monotonic() >= end:
                        break
                else:
                    self._remove(segment)
            if time.monotonic() >= end:
                return

    def close(self) -> None:
        """Release the segments; whatever is left in them is adopted by the next process."""
        with self._lock:
            for segment in (*self._sealed, *([self._active] if self._active else [])):
                os.close(segment.fd)
            self._sealed, self._active = [], None

    def _next(self) -> _Segment | None:
        with self._lock:
            if self._active is not None:
                self._sealed.append(self._active)
                self._active = None
            return self._sealed[0] if self._sealed else None

    def _remove(self, segment: _Segment) -> None:
        with self._lock:
            self._bytes -= os.fstat(segment.fd).st_size
            segment.path.unlink(missing_ok=True)
            os.close(segment.fd)
            self._sealed.remove(segment)

    def _create(self) -> _Segment:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._key}-{uuid.uuid4().hex}.jsonl"
        part = path.with_suffix(".part")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        # Locked before it has a name that adopt() looks for.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.rename(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._active = _Segment(path, fd)
        return self._active


def _lock(path: Path) -> _Segment | None:
    """The segment at ``path``, locked; None while another process has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    if not path.exists():  # its owner replayed and removed it between the open and the lock
        os.close(fd)
        return None
    return _Segment(path, fd)


def _some(lines: Iterable[bytes]) -> list[bytes]:
    """The next lines, as many as one transaction should take."""
    found: list[bytes] = []
    size = 0
    for line in lines:
        found.append(line)
        size += len(line)
        if len(found) == _TOGETHER or size >= _TOGETHER_BYTES:
            break
    return found


def _entry(line: bytes, path: Path) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if isinstance(entry, dict):
        return entry
    # Only the last line of a crashed process can be torn; nobody was told that it is kept.
    log.warning("%s: skipped a line of %d bytes that is no entry", path, len(line))
    return None
