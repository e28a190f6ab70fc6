"""What is said of coverage under shift, and of splits by item: means over splits with their s.e.

``oracle_below`` are set, shift and level where the mean coverage with true weights is below
1-α-2 s.e.; one in forty or so is by chance. ``estimated_low`` are those where estimated weights
cover less than 1-α-.02. ``nearer`` counts, of those where no weights at all miss 1-α by more than
two s.e., how often estimated weights come nearer to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.coverage_cells import Cell
from bench.coverage_shift import Shifted

SLACK = 0.02


def figures(
    moved: Sequence[tuple[str, Shifted]], items: Sequence[tuple[str, int, Cell]]
) -> dict[str, Any]:
    """``shift`` and ``by_item``."""
    groups: dict[tuple[str, str, float], dict[str, list[Shifted]]] = {}
    for name, s in moved:
        forms = groups.setdefault((name, s.shift, s.alpha), defaultdict(list))
        forms[s.form].append(s)
    table = [_shift(*key, forms) for key, forms in groups.items()]
    return {"shift": {**_criteria(table), "table": table}, "by_item": _items(items)}


def _shift(name: str, shift: str, alpha: float, forms: dict[str, list[Shifted]]) -> dict[str, Any]:
    """One set, shift and level: coverage of each form over the splits that it was not refused."""
    plain = forms["unweighted"]
    row: dict[str, Any] = {
        "set": name,
        "shift": shift,
        "alpha": alpha,
        "n": round(float(np.mean([s.n for s in plain]))),
        "m": round(float(np.mean([s.m for s in plain]))),
    }
    for form, found in forms.items():
        held = [s.coverage for s in found if s.coverage is not None]
        row[form] = {
            "coverage": float(np.mean(held)) if held else None,
            "error": float(np.std(held, ddof=1) / np.sqrt(len(held))) if len(held) > 1 else None,
            "effective": float(np.mean([s.effective for s in found if not s.refused] or [0.0])),
            "refused": sum(bool(s.refused) for s in found),
            "why": sorted({s.refused for s in found if s.refused})[:1],
        }
    return row


def _criteria(table: list[dict[str, Any]]) -> dict[str, Any]:
    known = [r for r in table if r["oracle"]["error"] is not None]
    both = [r for r in table if r["estimated"]["error"] is not None]
    missed = [r for r in both if abs(_off(r, "unweighted")) > 2 * r["unweighted"]["error"]]
    said = {
        "cells": len(table),
        "oracle_mean_excess": _mean([_off(r, "oracle") for r in known]),
        "oracle_below": [_name(r) for r in known if _off(r, "oracle") < -2 * r["oracle"]["error"]],
        "estimated_low": [_name(r) for r in both if _off(r, "estimated") < -SLACK],
        "unweighted_misses": len(missed),
        "nearer": sum(abs(_off(r, "estimated")) < abs(_off(r, "unweighted")) for r in missed),
        "refused_splits": sum(r["estimated"]["refused"] for r in table) // 3,
    }
    for shift in sorted({r["shift"] for r in both}):
        here = [r for r in both if r["shift"] == shift]
        said[f"mean_excess_{shift}"] = {
            form: float(np.mean([_off(r, form) for r in here]))
            for form in ("unweighted", "estimated", "oracle")
        }
    return said


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _off(row: dict[str, Any], form: str) -> float:
    return float(row[form]["coverage"]) - (1 - float(row["alpha"]))


def _name(row: dict[str, Any]) -> dict[str, Any]:
    """What a row is and how it covered."""
    forms = [f for f in ("unweighted", "oracle", "estimated", "bbse") if f in row]
    return {
        **{k: row[k] for k in ("set", "shift", "alpha")},
        **{f: row[f]["coverage"] for f in forms},
        "effective": row["estimated"]["effective"],
        "n": row["n"],
    }


def _items(items: Sequence[tuple[str, int, Cell]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[Cell]] = defaultdict(list)
    for name, _, cell in items:
        groups[name, cell.alpha].append(cell)
    made = []
    for (name, alpha), cells in groups.items():
        held = [c.covered / c.m for c in cells]
        made.append(
            {
                "set": name,
                "alpha": alpha,
                "method": cells[0].method,
                "n": round(float(np.mean([c.n for c in cells]))),
                "coverage": float(np.mean(held)),
                "sd": float(np.std(held, ddof=1)),
            }
        )
    return made
