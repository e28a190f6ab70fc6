"""What the benchmarks found, kept: a small JSON file each, from which figures and pictures come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DIGITS = 5  # more than any spread lets be told, and two more than are quoted


def keep(found: dict[str, Any], file: Path) -> None:
    """Write a benchmark's figures, rounded, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(rounded(found), separators=(",", ":"), default=str) + "\n")
    beside.replace(file)


def kept(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The figures of a benchmark, None where there are none."""
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def rounded(value: Any) -> Any:
    """The same with numbers of so many significant digits, so that files are small."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
