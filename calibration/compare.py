"""``hedged compare``: every module, scaling and score for one model, on one pass of its rows.

open the model → cache (features, outputs, labels) in one pass → `contest` on the cached rows →
milliseconds a row of every candidate's fused graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration.comparison.contest import Asked, check, contest, methods_of
from calibration.comparison.latency import ROWS, milliseconds
from calibration.comparison.records import Comparison
from calibration.fit_options import FitOptions
from calibration.head import Head
from calibration.material import (
    DEFAULT_SPLIT,
    Material,
    Progress,
    left_out,
    prepare,
    raw_rows,
)
from calibration.strange import corrupted_sets, given_sets, halved, labelled_sets


def compare(
    model: str | Path | None,
    data: str | Path,
    options: FitOptions,
    asked: Asked | None = None,
    *,
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
    progress: Progress | None = None,
    **how: Any,
) -> Comparison:
    """Everything that fits the model and the rows, on re-splits of one cache. ``how`` goes to
    `calibration.material.prepare`; of ``options`` the task, levels, seed, conformal method and
    prediction count.

    Raises a HedgedError that names the object and the fix, before any pass over the data where
    that can be told.
    """
    asked = asked or Asked()
    check(asked, options)
    report = _Counting(progress)
    material = prepare(model, data, options=options, progress=report, fractions=fractions, **how)
    methods, left = methods_of(material, options, asked)
    also = {**how, "progress": report}
    given, run = given_sets(material, asked.ood_data, options.task, also)
    strange, kept = halved(given)
    further, more = labelled_sets(material, asked.labelled, options.task, also)
    strange, run = strange + further, run + more
    if asked.corrupt:
        names = asked.corrupt if isinstance(asked.corrupt, tuple) else None
        copies, more = corrupted_sets(
            material,
            data,
            names,
            seed=options.seed,
            progress=lambda done, total: report("corrupt", done, total),
        )
        strange, run = strange + copies, run + more
    found = contest(material, options, asked, methods, strange, kept, fractions, report)
    bare, spent = _spent(material, data, found.heads, report)
    comparison = found.comparison
    table = tuple(
        s.model_copy(update={"ms_per_row": spent.get(s.name)}) for s in comparison.standings
    )
    return comparison.model_copy(
        update={
            "about": {
                "model": material.frozen.file,
                "data": str(data),
                **({"rows": told} if (told := left_out(material.cache)) else {}),
            },
            "standings": table,
            "left_out": left,
            "model_rows": report.rows + run,
            "bare_ms_per_row": bare,
        }
    )


class _Counting:
    """Passes progress on, and counts the rows that the model was run on to fill the cache: a cache
    that is complete is told of once, as a whole."""

    def __init__(self, progress: Progress | None):
        self._progress = progress
        self._first: int | None = None
        self.rows = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "cache":
            self._first = done if self._first is None else self._first
            self.rows = max(self.rows, done - self._first)
        if self._progress is not None:
            self._progress(what, done, total)


def _spent(
    material: Material, data: str | Path, heads: Mapping[str, Head], report: Progress
) -> tuple[float, dict[str, float]]:
    """Milliseconds a row: of the model alone, and of each candidate's fused graph."""
    items = material.usable[:: material.per][:ROWS] // material.per
    return milliseconds(
        material,
        heads,
        raw_rows(material, data, items),
        lambda done, total: report("latency", done, total),
    )
