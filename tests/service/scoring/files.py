"""A file of any format, read as a run reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from posthoc.contract import TensorSpec
from service.scoring.formats.format import Layout, Wanted
from service.scoring.formats.registry import FORMATS, format_of
from service.scoring.places import open_place

FLOAT = TensorSpec(name="x", dtype="float32", shape=(-1, 1))
INTEGER = TensorSpec(name="n", dtype="int64", shape=(-1, 1))


def look(path: Path) -> Layout:
    form = format_of(path.name)
    assert form is not None
    return form.look(open_place(path))


def rows_of(
    path: Path,
    columns: Sequence[str],
    inputs: Mapping[str, TensorSpec],
    *,
    at_once: int = 3,
    cut: bool = False,
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Rows and what is wrong with them, read ``at_once``; with ``cut`` each group by itself."""
    layout = look(path)
    every = range(len(layout.groups))
    rows: list[dict[str, Any]] = []
    bad: dict[int, str] = {}
    for groups in [[g] for g in every] if cut else [every]:
        wanted = Wanted(
            groups=groups,
            columns=columns,
            inputs=inputs,
            rows=lambda values: at_once,
            count=sum(layout.groups[g] for g in groups),
            start=layout.starts[groups[0]] if layout.starts and groups else 0,
        )
        form = format_of(path.name)
        assert form is not None and form is FORMATS[form.name]
        for piece in form.read(open_place(path), wanted):
            assert 0 < piece.batch.num_rows <= at_once
            piece.batch.validate(full=True)
            bad.update({len(rows) + r: why for r, why in piece.bad.items()})
            rows += pa.Table.from_batches([piece.batch]).to_pylist()
    assert len(rows) == sum(layout.groups)
    return rows, bad
