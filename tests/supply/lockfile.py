"""A lock file read strictly: a package of one version on a line, and hashes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.utils import canonicalize_name

PACKAGE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+) \\")
HASH = re.compile(r"    --hash=sha256:([0-9a-f]{64})( \\)?")


@dataclass(frozen=True, slots=True)
class Locked:
    """One package of a lock file."""

    name: str
    version: str
    hashes: tuple[str, ...]


def parse(text: str) -> list[Locked]:
    """Every package. Raises ValueError, naming the line, for whatever is not a pinned package with
    hashes, or a comment."""
    found: list[Locked] = []
    more = False  # whether a hash must follow
    for number, line in enumerate(text.splitlines(), 1):
        if not more and re.match(r"\s*#", line):
            continue
        if more and (part := HASH.fullmatch(line)):
            last = found.pop()
            found.append(Locked(last.name, last.version, (*last.hashes, part[1])))
            more = part[2] is not None
        elif not more and (part := PACKAGE.fullmatch(line)):
            found.append(Locked(canonicalize_name(part[1]), part[2], ()))
            more = True
        else:
            raise ValueError(f"line {number} is no pinned package with hashes: {line!r}")
    if more:
        raise ValueError("the last package has no hash")
    return found
