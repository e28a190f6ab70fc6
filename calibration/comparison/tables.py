"""A comparison on disk: everything as JSON, both leaderboards as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.comparison.records import Comparison


def write_tables(folder: Path, found: Comparison) -> None:
    """``comparison.json``, ``modules.csv`` and, where scores were compared, ``scores.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(found.model_dump_json(indent=1), "utf-8")
    _write(folder / "modules.csv", modules(found))
    if found.scores:
        _write(folder / "scores.csv", scores(found))


def modules(found: Comparison) -> list[dict[str, Any]]:
    """A line a candidate."""
    lines = []
    for s in found.standings:
        line: dict[str, Any] = {"rank": s.rank, "module": s.method, "scaling": s.scaling}
        line |= {"keeps_answer": s.keeps, "tied_with_best": s.tied, "p_value": s.p_value}
        for name, v in s.figures.items():
            line |= {name: v.mean, f"{name}_sd": v.sd}
        for name, d in (("to_best", s.to_best), ("to_scaling_alone", s.to_baseline)):
            if d is not None:
                line |= {name: d.value, f"{name}_low": d.low, f"{name}_high": d.high}
        line |= {"ms_per_row": s.ms_per_row, "fit_seconds": s.fit_seconds}
        lines.append(line | {"errors": "; ".join(s.errors)})
    return lines


def scores(found: Comparison) -> list[dict[str, Any]]:
    """A line a score."""
    lines = []
    for s in found.scores:
        line: dict[str, Any] = {"rank": s.rank, "score": s.score}
        if s.mean is not None:
            line |= {"mean_auroc": s.mean.mean, "mean_auroc_sd": s.mean.sd}
        for name, v in s.auroc.items():
            line |= {name: v.mean, f"{name}_sd": v.sd}
        lines.append(line | {"errors": "; ".join(s.errors)})
    return lines


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(k for line in lines for k in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
