"""Where data lies: a path of this machine, or a URL that pyarrow can open (file, s3, gs, abfs)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from posthoc.contract import DataError
from service.scoring.errors import ScoringError, first_line

_WILD = frozenset("*?[")
_IN_URLS = "/%:@!$&'()*+,;=~"  # what stands for itself in the path of a URL
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Found:
    """A file: ``name`` is its POSIX path below where it was looked for; ``mtime_ns`` when it was
    changed last, as its file system says (object stores know seconds)."""

    place: Place
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Place:
    """A path on a file system; ``text`` is what the user calls it, without settings and
    credentials. It can be pickled, and then holds them."""

    text: str
    fs: pafs.FileSystem = field(repr=False)
    path: str

    @property
    def local(self) -> Path | None:
        """The path of this machine; None on an object store."""
        return Path(self.path) if isinstance(self.fs, pafs.LocalFileSystem) else None

    def below(self, name: str) -> Place:
        """The place of a POSIX path below this one."""
        return Place(_joined(self.text, name), self.fs, _joined(self.path, name))

    def info(self) -> pafs.FileInfo:
        """What is there. Raises OSError when the store cannot be asked."""
        return self.fs.get_file_info(self.path)

    def open(self) -> pa.NativeFile:
        """The file, for random access. Raises OSError."""
        return self.fs.open_input_file(self.path)

    def __str__(self) -> str:
        return self.text


def open_place(text: str | Path) -> Place:
    """The place of a path or URL; nothing needs to be there.

    Settings of a store stand in the URL as pyarrow reads them, such as
    ``s3://bucket/path?region=eu-west-1``, and credentials in the environment. In a URL ``%20`` is a
    space; anything but ``?`` and ``%`` may also stand for itself. Raises DataError for a URL that
    is none, or of a file system that this pyarrow does not have; the message has neither settings
    nor credentials in it.
    """
    url = str(text)
    if "://" not in url:
        where = Path(text).absolute()
        return Place(url, pafs.LocalFileSystem(), where.as_posix())
    scheme, _, rest = url.partition("://")
    path, sign, settings = rest.partition("?")
    path = quote(_BARE_PERCENT.sub("%25", path), safe=_IN_URLS)
    shown = shown_url(url)
    try:
        fs, path = pafs.FileSystem.from_uri(f"{scheme}://{path}{sign}{settings}")
    except (OSError, pa.ArrowException, ValueError) as e:
        # Its message may quote the URL, and so a password.
        reason = "" if settings or shown != url else f" ({first_line(e)})"
        raise DataError(
            f"{shown}: this URL cannot be opened{reason}; file, s3, gs and abfs are known, with "
            "settings as pyarrow has them behind a ?"
        ) from (e if reason else None)
    return Place(shown, fs, path.rstrip("/") or path)


def shown_url(text: str) -> str:
    """A path as it is; a URL without its settings, and without user and password."""
    if "://" not in text:
        return text
    scheme, _, rest = text.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    user, at, name = host.rpartition("@")
    if not at and ":" in host and not host.rpartition(":")[2].isdigit() and "@" in path:
        # A password with a slash in it that was not written as %2F.
        return f"{scheme}://{path.rpartition('@')[2]}"
    # Only abfs has its container before the @, and a password behind a colon.
    keep = f"{user.partition(':')[0]}@" if at and scheme.startswith("abfs") else ""
    return f"{scheme}://{keep}{name if at else host}{slash}{path}"


def files_below(place: Place) -> list[Found]:
    """Every file at a place: the file itself, those of a folder and its sub-folders, or those that
    a pattern matches (``*``, ``?`` and ``[]`` within a name, ``**`` for any folders), by name.

    Names that begin with ``_`` or ``.`` are left out below a folder, as Hive and Spark do. Raises
    DataError for a place where nothing is, and ScoringError when the store cannot be asked.
    """
    try:
        info = place.info()
        if info.type == pafs.FileType.File:
            return [_found(place, info, info.base_name)]
        if info.type == pafs.FileType.Directory:
            return sorted(_walk(place), key=_by_name)
        root, pattern = _pattern(place)
        if not pattern:
            raise DataError(f"{place}: no such file or folder")
        matching = [f for f in _walk(root) if _matches(f.name.split("/"), pattern)]
    except OSError as e:
        raise ScoringError(f"{place}: cannot be listed ({first_line(e)})") from e
    if not matching:
        raise DataError(f"{place}: no file has such a name")
    return sorted(matching, key=_by_name)


def overlap(source: Place, output: Place) -> bool:
    """Whether files of ``output`` may be taken for those of ``source``, or written over them."""
    if type(source.fs) is not type(output.fs):
        return False
    root, pattern = source, list[str]()
    if source.local is None or not source.local.exists():
        root, pattern = _pattern(source)
    a, b = (
        (p.path if p.local is None else p.local.resolve().as_posix()).strip("/").split("/")
        for p in (root, output)
    )
    if a[: len(b)] == b:
        return True
    if b[: len(a)] != a:
        return False
    return not pattern or _reaches(b[len(a) :], pattern)


def _by_name(found: Found) -> str:
    return found.name


def _found(place: Place, info: pafs.FileInfo, name: str) -> Found:
    return Found(place, name, info.size, info.mtime_ns or 0)


def _walk(root: Place) -> Iterator[Found]:
    selector = pafs.FileSelector(root.path, recursive=True, allow_not_found=True)
    for info in root.fs.get_file_info(selector):
        name = info.path[len(root.path) :].lstrip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if info.type == pafs.FileType.File and not hidden:
            yield _found(root.below(name), info, name)


def _pattern(place: Place) -> tuple[Place, list[str]]:
    """The folder before the first part of the path that is a pattern, and those from it on."""
    parts = place.path.split("/")
    fixed = next((i for i, part in enumerate(parts) if _WILD & set(part)), len(parts))
    path, rest = "/".join(parts[:fixed]) or "/", parts[fixed:]
    text = place.text.split("/")
    return Place("/".join(text[: len(text) - len(rest)]) or ".", place.fs, path), rest


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[at:], pattern[1:]) for at in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _reaches(folder: list[str], pattern: list[str]) -> bool:
    """Whether something below a folder can match."""
    if not folder:
        return bool(pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        return True
    return fnmatchcase(folder[0], pattern[0]) and _reaches(folder[1:], pattern[1:])


def _joined(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"
