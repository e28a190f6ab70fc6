"""The bundles beside a monitor: their manifests alone, read again when they change."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from calibration.bundle import MANIFEST, Manifest, parse_manifest, sha256
from calibration.drift.risk_monitor import RiskMonitor
from posthoc.contract import BundleError
from service.bundles import bundle_versions, check_place, is_bundle, model_folders
from service.monitor.fields import Key
from service.monitor.promises import Promises, promises_of, with_coverage
from service.rows import Source

_log = logging.getLogger("hedged.monitor")
Stamp = tuple[int, int, int]


class Shelf:
    """Every version of every model at ``root``: one bundle, or ``ROOT/<name>/<version>/``.

    Raises BundleError at once where none can be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[Path, tuple[Stamp, Key, Promises]] = {}
        self._warned: set[str] = set()
        problems = self._scan()
        if not self._read:
            none = f"{root} holds no bundle: neither {MANIFEST} nor <name>/<version>/"
            raise BundleError(next(iter(problems), none))
        self._warn(problems)

    def promises(
        self, sources: Iterable[Source], coverage: Mapping[Key, Mapping[str, RiskMonitor]]
    ) -> Mapping[Key, Promises]:
        """What bundles promise that are there now, by model and version, of those that a ledger has
        met; ``coverage`` by level that was watched so far counts where the ledger met no other
        bundle as that version. A warning names, once, what cannot be read, and a bundle that is
        left out as its identity is not that of the ledger's latest."""
        problems = self._scan()
        served: dict[Key, list[str]] = defaultdict(list)
        for s in sources:
            served[s.model, s.version].append(s.identity)
        found = {}
        for folder, (_, key, promises) in self._read.items():
            if key not in served:
                continue
            if served[key] == [promises.identity]:
                found[key] = with_coverage(promises, coverage.get(key, {}))
            elif served[key][-1] == promises.identity:
                found[key] = promises
            else:
                problems.append(
                    f"{folder} is not the bundle that predicted as {key[0]} {key[1]}: what it "
                    "promises is not watched"
                )
        self._warn(problems)
        return found

    def _scan(self) -> list[str]:
        """Read what is new; the problems."""
        problems = []
        try:
            for folder, name in _folders(self._root):
                try:
                    self._look(folder, name)
                except BundleError as e:
                    problems.append(str(e))
        except BundleError as e:
            problems.append(str(e))
        return problems

    def _look(self, folder: Path, name: str | None) -> None:
        file = folder / MANIFEST
        try:
            s = file.stat()
            stamp = (s.st_mtime_ns, s.st_size, s.st_ino)
            if folder in self._read and self._read[folder][0] == stamp:
                return
            data = file.read_bytes()
        except OSError as e:
            raise BundleError(f"{file} cannot be read ({e.strerror})") from None
        manifest: Manifest = parse_manifest(data, folder)
        if name is not None:
            check_place(name, folder, manifest)
        key = manifest.name, manifest.version
        self._read[folder] = (stamp, key, promises_of(manifest, sha256(data)))

    def _warn(self, problems: Iterable[str]) -> None:
        for text in problems:
            if text not in self._warned:
                self._warned.add(text)
                _log.warning("%s", text)


def _folders(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Folders of bundles, each with the name that its place says."""
    if is_bundle(root):
        yield root, None
        return
    for name, folder in model_folders(root).items():
        for version in bundle_versions(folder):
            yield folder / version, name
