"""``python -m bench.table heads.json``: the quality table as Markdown, for docs/quality.md."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.heads import BASELINE
from bench.suite import suite

_COLUMNS = {
    "classification": ("nll_difference", "nll", "ece", "brier", "ood_auroc"),
    "regression": ("nll_difference", "nll", "crps", "rmse"),
}
_TITLES = {
    "nll_difference": "NLL − scaling alone",
    "nll": "NLL",
    "ece": "ECE, debiased",
    "brier": "Brier",
    "ood_auroc": "OOD AUROC",
    "crps": "CRPS",
    "rmse": "RMSE",
}
_HEAD = """# Every module on the developer suite

`python -m bench heads --json > heads.json && python -m bench.table heads.json > docs/quality.md`
makes this page. {splits} seeded splits of each set, mean ± standard deviation over splits (not a
standard error). The system to beat is `none`: the frozen model with a temperature (a regression:
one scale) fitted on the same calibration rows. NLL in nats; the difference is the mean over test
rows of the same splits, below zero is better. OOD AUROC is by the module's own epistemic
uncertainty, where it has one, else by entropy: it is not the score that flags strange rows.

Worse than scaling alone by more than {margin} nats in the mean over splits: {worse}.
"""


def render(result: dict[str, Any]) -> str:
    """The page."""
    worse = ", ".join(result["worse"]) or "none"
    parts = [_HEAD.format(splits=result["splits"], margin=result["margin"], worse=worse)]
    parts += ["## In one table", *summary(result["table"])]
    for chosen in suite():
        rows = [r for r in result["table"] if r["set"] == chosen.name]
        if not rows:
            continue
        columns = [c for c in _COLUMNS[chosen.task] if any(c in r for r in rows)]
        lines = [
            (f"`{r['module']}`", *(_cell(r, c) for c in columns), "; ".join(r.get("errors", ())))
            for r in sorted(rows, key=_order)
        ]
        titles = ("module", *(_TITLES[c] for c in columns), "")
        parts += [f"## {chosen.name}", f"{chosen.about} ({chosen.task}).", _table(titles, lines)]
    return "\n\n".join(parts) + "\n"


def summary(table: Sequence[dict[str, Any]]) -> list[str]:
    """A line a module and task: mean difference over sets, and the sets it is better or worse on
    by more than two standard errors of its splits."""
    found = []
    for task in ("classification", "regression"):
        sets = {s.name for s in suite() if s.task == task}
        rows = [r for r in table if r["set"] in sets and r["module"] != BASELINE]
        lines = []
        for module in dict.fromkeys(r["module"] for r in rows):
            own = [r for r in rows if r["module"] == module and not math.isnan(r["nll_difference"])]
            if not own:
                continue
            mean = sum(r["nll_difference"] for r in own) / len(own)
            better = sum(r["nll_difference"] < -_two_errors(r) for r in own)
            worse = sum(r["nll_difference"] > _two_errors(r) for r in own)
            lines.append(
                (mean, (f"`{module}`", f"{mean:+.4f}", str(better), str(worse), str(len(own))))
            )
        titles = (task, "NLL − scaling alone, mean over sets", "better on", "worse on", "of")
        found.append(_table(titles, [line for _, line in sorted(lines)]))
    return found


def _order(r: dict[str, Any]) -> tuple[bool, bool, float]:
    """The system to beat, the others from the best on, those without a figure last."""
    unknown = math.isnan(r["nll_difference"])
    return r["module"] != BASELINE, unknown, 0.0 if unknown else r["nll_difference"]


def _two_errors(r: dict[str, Any]) -> float:
    return 2 * float(r.get("nll_difference_sd", 0.0)) / math.sqrt(max(r["splits"], 1))


def _cell(r: dict[str, Any], column: str) -> str:
    if column not in r or math.isnan(r[column]):
        return "–"
    sign = "+" if column == "nll_difference" else ""
    return f"{r[column]:{sign}.4f} ± {r.get(column + '_sd', 0.0):.4f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line = "| " + " | ".join(titles) + " |"
    rule = "| " + " | ".join("---" for _ in titles) + " |"
    return "\n".join([line, rule, *("| " + " | ".join(r) + " |" for r in rows)])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.table heads.json")
    print(render(json.loads(Path(sys.argv[1]).read_text("utf-8"))), end="")
