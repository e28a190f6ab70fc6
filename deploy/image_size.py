"""What an installed environment takes on disk, a package a line, the largest first:

    python deploy/image_size.py                                     this interpreter's packages
    python deploy/image_size.py --lock deploy/locks/serve-cpu.txt   those that the image installs
    python deploy/image_size.py --site DIR/site-packages --json     another environment's

Where something of the lock file is not there in its very version, it names that and tells no size.

Sizes are those of the files that each package says it installed, compiled bytecode included, in
MB of a million bytes. The image is larger by its base, Python on Debian.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Package:
    """One installed package, and the bytes of its files."""

    name: str
    version: str
    bytes: int


def installed(site: Path | None = None) -> list[Package]:
    """Every package in a folder of packages, or of this interpreter, the largest first."""
    found = metadata.distributions(path=[str(site)]) if site else metadata.distributions()
    sizes = {_plain(d.name): Package(_plain(d.name), d.version, _bytes(d)) for d in found}
    return sorted(sizes.values(), key=lambda p: (-p.bytes, p.name))


def locked(path: Path) -> dict[str, str]:
    """Name and version of every package in a lock file."""
    lines = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", path.read_text("utf-8"), re.M)
    return {_plain(name): version for name, version in lines}


def missing(packages: Collection[Package], lock: dict[str, str]) -> list[str]:
    """What of a lock file is not installed in that very version, as ``name==version``."""
    have = {p.name: p.version for p in packages}
    return [f"{name}=={v}" for name, v in lock.items() if have.get(name) != v]


def _bytes(distribution: metadata.Distribution) -> int:
    # A file that two entries name, or that was compiled again, counts as it lies there now.
    paths = {Path(str(distribution.locate_file(f))).resolve() for f in distribution.files or ()}
    return sum(path.stat().st_size for path in paths if path.is_file())


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Print the table, or JSON; 1 where something of the lock file is not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lock", type=Path, help="count the packages of this lock file only")
    parser.add_argument("--site", type=Path, help="folder of packages; default this interpreter's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    packages = installed(options.site)
    if options.lock:
        lock = locked(options.lock)
        if absent := missing(packages, lock):
            _tell_missing(absent, options.lock, options.json)
            return 1
        packages = [p for p in packages if p.name in lock]
    total = sum(p.bytes for p in packages)
    if options.json:
        record = {"bytes": total, "packages": [asdict(p) for p in packages], "missing": []}
        print(json.dumps(record, indent=1))
    else:
        for package in packages:
            print(f"{package.bytes / 1e6:9.1f} MB  {package.name} {package.version}")
        print(f"{total / 1e6:9.1f} MB  in all, {len(packages)} packages")
    return 0


def _tell_missing(absent: list[str], lock: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"missing": absent}, indent=1))
        return
    for name in absent:
        print(f"not there: {name}", file=sys.stderr)
    print(
        f"{len(absent)} packages of {lock} are not here in that version, so no size is told; "
        f"install them into an environment of their own: "
        f"pip install --require-hashes --no-deps -r {lock}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
