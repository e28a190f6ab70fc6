"""The output folder of a run: begun, resumed, or cleared."""

from __future__ import annotations

from pathlib import Path

from posthoc.contract import DataError
from service.scoring.commit import PART, remove, remove_parts, write_file, writing
from service.scoring.errors import ScoringError
from service.scoring.manifest import RUN, RunManifest, check_same_run, read_manifest

SUCCESS = "_SUCCESS"
SUMMARY = "_summary.json"


def check_apart(source: Path, output: Path) -> None:
    """Raise DataError where an output would be taken for input, or written over it."""
    a, b = source.resolve(), output.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise DataError(f"input {source} and output {output} overlap; give another output folder")


def begin(folder: Path, run: RunManifest, *, overwrite: bool) -> None:
    """Make ``folder`` this run's own: new, resumed without its unfinished parts, or cleared.

    Raises ScoringError for a folder that holds anything but a run, and for another run's folder
    unless ``overwrite``.
    """
    path = folder / RUN
    if not path.exists() and any(not p.name.startswith(PART) for p in folder.iterdir()):
        raise ScoringError(f"{folder} is not an output of scoring; give a new or empty folder")
    with writing(folder):
        remove_parts(folder)
        if overwrite:
            clear(folder)
    if path.exists():
        check_same_run(folder, read_manifest(path), run)
    else:
        write_file(path, run.text())


def clear(folder: Path) -> None:
    """Remove what a run wrote; its manifest last, so that a killed clearing can be repeated."""
    for path in (folder / SUCCESS, folder / SUMMARY, *sorted(folder.rglob("*.parquet"))):
        remove(path)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    remove(folder / RUN)
