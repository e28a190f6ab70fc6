"""Bundles on disk: ``ROOT/<name>/<version>/``, and which version of each name is live."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from calibration.bundle import MANIFEST, Manifest, parse_manifest
from posthoc.contract import BundleError

ACTIVE = "active.json"


class UndecidedError(BundleError):
    """Nothing says which version of a name is live, and there is not just one."""


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is one bundle, and not a root of bundles."""
    return (path / MANIFEST).is_file()


def find_bundles(path: Path) -> dict[str, Path]:
    """Name → bundle folder, of one bundle or of a root ``ROOT/<name>/<version>/``.

    ``ROOT/<name>/active.json`` (``{"version": "…"}``) says which version is live; it may be left
    out while there is one version. A name whose live version is not said or not there is left out.
    Raises BundleError for a folder that holds no bundle, and with every reason where no name is
    left.
    """
    if is_bundle(path):
        manifest = parse_manifest((path / MANIFEST).read_bytes(), path)
        return {manifest.name: path}
    found: dict[str, Path] = {}
    problems: dict[str, Exception] = {}
    for name, folder in model_folders(path).items():
        try:
            found[name] = folder / live_version(folder)
        except BundleError as e:
            problems[name] = e
    if not found:
        raise none_of(path, problems)
    return found


def none_of(root: Path, problems: Mapping[str, Exception]) -> Exception:
    """What to raise where no model of a root can be served, with the reason of each name."""
    if not problems:
        return BundleError(f"{root} holds no bundle: neither {MANIFEST} nor <name>/<version>/")
    if len(problems) == 1:
        return next(iter(problems.values()))
    why = "; ".join(f"{name}: {error}" for name, error in problems.items())
    return BundleError(f"no model of {root} can be served: {why}")


def model_folders(root: Path) -> dict[str, Path]:
    """Name → folder of its versions. Raises BundleError where ``root`` is no folder."""
    if not root.is_dir():
        raise BundleError(f"{root}: no such folder; give a bundle or a root of bundles")
    return {
        folder.name: folder
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and _is_model(folder)
    }


def _is_model(folder: Path) -> bool:
    # Other folders, such as the lost+found of a disk, are no model that anybody could miss.
    return any(
        p.name == ACTIVE or (p.is_dir() and not p.name.startswith(".")) for p in folder.glob("*")
    )


def model_folder(root: Path, name: str) -> Path:
    """The folder of one name. Raises BundleError naming those that there are."""
    if is_bundle(root):
        raise BundleError(
            f"{root} is one bundle and not a root of ROOT/<name>/<version>/; "
            "only the versions of a root are switched"
        )
    folders = model_folders(root)
    if name not in folders:
        raise BundleError(f"{root} has no model {name!r}; there are {_listed(list(folders))}")
    return folders[name]


def bundle_versions(folder: Path) -> list[str]:
    """The versions of one name, sorted."""
    # A fit writes into a hidden folder beside the versions, and may have been killed there.
    found = (p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
    return sorted(name for name in found if not name.startswith("."))


def live_version(folder: Path) -> str:
    """The live version of one name. Raises BundleError where it is not said or not there."""
    versions = bundle_versions(folder)
    active = folder / ACTIVE
    try:
        text = active.read_text("utf-8")
        version = json.loads(text)["version"]
    except FileNotFoundError:
        if len(versions) != 1:
            how = f"name the live one: hedged activate {folder.parent} {folder.name} VERSION"
            raise UndecidedError(
                f"{folder} holds {len(versions)} versions and no {ACTIVE}; "
                f"{how if versions else 'put a bundle into <version>/'}"
            ) from None
        return versions[0]
    except OSError as e:
        raise BundleError(f"{active} cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise BundleError(f'{active} must be {{"version": "…"}}') from None
    if version not in versions:
        raise BundleError(f"{active} names version {version!r}; there are {_listed(versions)}")
    return str(version)


def check_place(name: str, folder: Path, manifest: Manifest) -> None:
    """Raise BundleError where a bundle is not the name and version that its place says."""
    if manifest.name != name:
        raise BundleError(
            f"{folder} is a bundle of {manifest.name!r} and lies in the folder of {name!r}"
        )
    if manifest.version != folder.name:
        # Answers, labels and metrics say the manifest's version: two that share it would mix.
        raise BundleError(
            f"{folder} is version {manifest.version!r} of {name!r}; rename the folder to that, "
            f"or fit with --version {folder.name}"
        )


def write_active(folder: Path, version: str) -> None:
    """Name the live version: readers see the old ``active.json`` or the new one, whole.

    Raises BundleError where the folder cannot be written.
    """
    active, part = folder / ACTIVE, folder / f".{ACTIVE}.part-{os.getpid()}"
    try:
        with part.open("w", encoding="utf-8") as f:
            f.write(json.dumps({"version": version}) + "\n")
            f.flush()
            os.fsync(f.fileno())
        part.replace(active)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the rename itself survives a power failure too
        finally:
            os.close(descriptor)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise BundleError(f"{active} cannot be written ({e.strerror})") from e


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
