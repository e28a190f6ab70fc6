"""The only list of formats."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc.contract import DataError
from service.scoring.formats.arrays import NPY, NPZ
from service.scoring.formats.delimited import CSV
from service.scoring.formats.format import Format
from service.scoring.formats.images import IMAGES
from service.scoring.formats.ipc import IPC
from service.scoring.formats.ndjson import NDJSON
from service.scoring.formats.parquet import PARQUET
from service.scoring.places import Found, Place

FORMATS: dict[str, Format] = {f.name: f for f in (PARQUET, IPC, CSV, NDJSON, NPY, NPZ, IMAGES)}


def format_of(name: str) -> Format | None:
    """The format of a file by its name; None for one that is no table."""
    return next((f for f in FORMATS.values() if f.stem(name) is not None), None)


def tables_among(files: Sequence[Found], root: Place) -> tuple[Format, list[Found]]:
    """Those of ``files`` that are rows or hold them, and their one format.

    Raises DataError where there is none, and for tables of several formats.
    """
    known = {f.name: found for f in files if (found := format_of(f.name)) is not None}
    if not known:
        endings = ", ".join(e for f in FORMATS.values() for e in f.endings)
        raise DataError(f"{root}: no table and no image; none of its files ends in {endings}")
    first, *others = dict.fromkeys(known.values())
    if others:
        names = " and ".join(f.name for f in (first, *others))
        raise DataError(
            f"{root}: it has {names} files; score one kind after the other, by a pattern such as "
            f"'{root}/**/*{first.endings[0]}'"
        )
    return first, [f for f in files if f.name in known]
