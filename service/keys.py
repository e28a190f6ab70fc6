"""API keys: a file of names, roles and hashes, read again when it changes.

A key is 256 random bits, so a plain SHA-256 hides it: there is nothing to guess that a slow or
salted hash would make dearer, as there is with passwords. The key itself is shown once and kept
nowhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from posthoc.contract import HedgedError

Role = Literal["predict", "labels", "metrics", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
NAME = r"[A-Za-z0-9._:-]{1,128}"
MAX_BYTES = 1 << 20  # of a file of keys
_CHECK_S = 1.0  # the file is looked at no more often
_NEW = "hedged_"  # begins every key, so that scanners of leaked secrets can tell one
_log = logging.getLogger("hedged.keys")


class KeysError(HedgedError):
    """A file of keys that cannot be read or changed as wanted. The message names it."""


class Key(BaseModel):
    """One key: what it is called, what it may do, and the SHA-256 of its text in hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime

    def may(self, role: Role) -> bool:
        """Whether the key has ``role``; "admin" has all."""
        return role in self.roles or "admin" in self.roles


class KeyFile(BaseModel):
    """A file of keys, JSON: ``{"keys": [{"name", "roles", "sha256", "created"}]}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...]

    @field_validator("keys")
    @classmethod
    def _named_once(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        names = [key.name for key in keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several keys are called {', '.join(twice)}")
        return keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises KeysError for one that is missing, too large or not valid."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise KeysError(f"keys file {path}: {e.strerror}; make one with hedged keys add") from None
    if len(text) > MAX_BYTES:
        raise KeysError(f"keys file {path} is larger than {MAX_BYTES} bytes")
    try:
        return KeyFile.model_validate_json(text).keys
    except ValidationError as e:
        # Never the input of an error: somebody may have pasted a key where its hash belongs.
        faults = (f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in e.errors())
        raise KeysError(f"keys file {path}: {'; '.join(faults)}") from None


def add_key(path: Path, name: str, roles: Sequence[Role]) -> tuple[Key, str]:
    """Make a key, write its hash into the file (a new one: mode 0600), and give both.

    Raises KeysError when the file cannot be used, or has a key of that name.
    """
    token = _NEW + secrets.token_urlsafe(32)
    made = Key(
        name=name,
        roles=tuple(role for role in ROLES if role in roles),
        sha256=hash_token(token.encode()),
        created=datetime.now(UTC).replace(microsecond=0),
    )
    with _alone(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise KeysError(f"{path} has a key {name!r}; revoke it first, or choose another name")
        _write(path, (*keys, made))
    return made, token


def revoke_key(path: Path, name: str) -> Key:
    """Take a key out of the file, and give it. Raises KeysError when there is none."""
    with _alone(path):
        keys = read_keys(path)
        found = [key for key in keys if key.name == name]
        if not found:
            raise KeysError(f"{path} has no key {name!r}; hedged keys list {path} names them")
        _write(path, tuple(key for key in keys if key.name != name))
    return found[0]


def hash_token(token: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(token).hexdigest()


class Keys:
    """The keys of a file, as it is now.

    The file is looked at once a second at most, while requests come. When it cannot be read the
    keys from before are kept, and the failure is logged and told to ``failed`` once for each such
    state of it. Raises KeysError when it cannot be read at first.
    """

    def __init__(
        self,
        path: Path,
        *,
        failed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._failed = failed
        self._clock = clock
        self._seen = _signature(path)  # before reading: a change in between is read again
        self._keys = read_keys(path)
        self._due = clock() + _CHECK_S

    def find(self, token: bytes) -> Key | None:
        """The key that has this text, in a time that does not depend on which one it is."""
        if self._clock() >= self._due:
            self._look()
        sent = hash_token(token)
        found = None
        for key in self._keys:
            if hmac.compare_digest(sent, key.sha256):
                found = key
        return found

    def _look(self) -> None:
        self._due = self._clock() + _CHECK_S
        signature = _signature(self.path)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._keys = read_keys(self.path)
        except KeysError as e:
            self._failed()
            _log.error("the keys from before are kept: %s", e)
        else:
            _log.info("%d keys from %s", len(self._keys), self.path)


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None when there is none."""
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One change of the keys in a folder at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as e:
        raise KeysError(f"keys file {path}: {e.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Replace the file whole, or leave it as it was. A file that exists keeps its mode."""
    path = path.resolve()  # of a link, what it leads to
    part = None
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        fd, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "w") as file:
            file.write(KeyFile(keys=keys).model_dump_json(indent=1) + "\n")
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except OSError as e:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise KeysError(f"keys file {path}: {e.strerror}") from None
