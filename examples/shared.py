"""What the scripts beside this one print and ask in the same way."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(main: Callable[[Path], None], doc: str | None) -> None:
    """``main`` in a new folder: the one that --out names, or a temporary one."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="new folder; default: a temporary one")
    folder = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="hedged-"))
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
    print(f"everything made is in {folder}")


def show_systems(found: Any, *metrics: str) -> None:
    """The frozen model, scaling alone, and the bundle, with 95 % intervals."""
    for system in found.systems:
        figures = ((name, system.metrics[name]) for name in metrics)
        cells = [f"{name} {f.value:.4f} ({f.low:.4f}–{f.high:.4f})" for name, f in figures]
        print(f"{system.name:18}", *cells, sep="  ")


def show_gain(found: Any, beside: str) -> None:
    """What the module gains over scaling alone on the same rows, and whether that is sure."""
    gain = next(d for d in found.differences if d.metric == "nll" and d.to != "frozen")
    show_difference(gain.value, gain.low, gain.high, beside)


def show_difference(value: float, low: float, high: float, beside: str) -> None:
    """A difference of log losses, below zero where the bundle is better."""
    verdict = "better" if high < 0 else "worse" if low > 0 else "no sure difference"
    print(f"nll beside {beside}: {value:+.4f} ({low:+.4f} to {high:+.4f}), {verdict}")


def show_levels(found: Any) -> None:
    """Coverage beside what luck allows, and the size of sets."""
    for level in found.levels:
        luck = f"luck allows {level.band_low:.4f}–{level.band_high:.4f}"
        size = f"mean size {level.mean_size:.2f}"
        print(f"level {level.level}: coverage {level.coverage:.4f} ({luck}), {size}")
