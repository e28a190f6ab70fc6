"""``python -m bench NAME [--quick] --json``: run one benchmark (or all) and print one object.

With ``--out FOLDER`` each is also kept as FOLDER/NAME.json as soon as it is done, and ``all``
leaves out what is kept there already: a run that was cut off is gone on with by the same command.
``all --quick`` leaves out those that take long all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.results import keep
from calibration.assemble import versions

NAMES = (
    "overhead",
    "resplits",
    "laplace",
    "fit",
    "heads",
    "ood",
    "compare",
    "knn",
    "bayescap",
    "dropout",
    "abnn",
    "dense",
    "scaling",
    "coverage",
    "folds",
    "quantile",
    "risk",
    "http",
    "labels",
    "drift",
    "monitors",
    "batch",
    "shift_kinds",
)


# A minute or more each, even with fewer runs: `all --quick` leaves them to be asked for by name.
SLOW = ("heads", "ood", "compare", "dropout", "abnn", "dense", "batch", "shift_kinds")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", action="store_true", help="print JSON (the only form there is)")
    parser.add_argument("--out", type=Path, help="folder in which to keep figures, too")
    asked = parser.parse_args()
    # As Ctrl-C does: servers that a benchmark started end with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if asked.name != "all":
        print(json.dumps(measured(asked.name, asked.quick, asked.out), indent=1, default=str))
        return
    found = {}
    for name in NAMES:
        if asked.quick and name in SLOW:
            print(f"{name}: left out, by name: python -m bench {name} --quick", file=sys.stderr)
            continue
        if asked.out and (asked.out / f"{name}.json").exists():
            print(f"{name}: kept already", file=sys.stderr)
            continue
        found[name] = measured(name, asked.quick, asked.out)
        print(f"{name}: done", file=sys.stderr)
    print(json.dumps(found, indent=1, default=str))


def measured(name: str, quick: bool, out: Path | None) -> dict[str, Any]:
    """The figures of a benchmark, with the versions and the machine that made them."""
    started = time.monotonic()
    found = {
        **import_module(f"bench.{name}").run(quick),
        "quick": quick,
        "bench_seconds": time.monotonic() - started,
        "versions": versions(),
        "machine": {
            "cpus": os.cpu_count(),
            "cpu": _processor(),
            "machine": platform.machine(),
            "system": platform.system(),
        },
    }
    if out:
        keep(found, out / f"{name}.json")
    return found


def _processor() -> str | None:
    """What Linux calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((text.partition(":")[2].strip() for text in lines if "model name" in text), None)


if __name__ == "__main__":
    main()
