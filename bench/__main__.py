"""``python -m bench NAME [--quick] --json``: run one benchmark (or all) and print one object."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import import_module

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


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", action="store_true", help="print JSON (the only form there is)")
    asked = parser.parse_args()
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.system()}
    found = {
        n: import_module(f"bench.{n}").run(asked.quick) for n in NAMES if asked.name in (n, "all")
    }
    body = found if asked.name == "all" else found[asked.name]
    print(json.dumps({**body, "versions": versions(), "machine": machine}, indent=1, default=str))


main()
