"""``python -m bench.table heads|dense``: a quality table as Markdown, of what is kept.

Of ``python -m bench heads`` for docs/quality.md, of ``python -m bench dense`` for docs/dense.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bench.heads import BASELINE
from bench.results import kept
from bench.suite import suite

_COLUMNS = {
    "classification": ("nll_difference", "nll", "ece", "brier", "ood_auroc"),
    "regression": ("nll_difference", "nll", "crps", "rmse"),
}
_MAP_COLUMNS = {
    "classification": (
        *("nll_difference", "nll", "debiased_ece", "class_ece"),
        *("accuracy", "ause", "ged", "uncovered"),
    ),
    "regression": (
        *("nll_difference", "nll", "uce", "pearson"),
        *("pearson_pooled", "ause", "uncovered"),
    ),
}
_TITLES = {
    "nll_difference": "NLL − scaling alone",
    "nll": "NLL",
    "ece": "ECE, debiased",
    "brier": "Brier",
    "ood_auroc": "OOD AUROC",
    "crps": "CRPS",
    "rmse": "RMSE",
    "debiased_ece": "ECE, debiased",
    "class_ece": "class-wise ECE",
    "accuracy": "accuracy",
    "uce": "UCE",
    "pearson": "σ ~ error, within images",
    "pearson_pooled": "σ ~ error, pooled",
    "ause": "AUSE",
    "ged": "GED²",
    "uncovered": "uncovered",
}
_HEAD = """# Every module on the developer suite

`python -m bench heads --out bench/results && python -m bench.table heads > docs/quality.md`
makes this page. {splits} seeded splits of each set, mean ± standard deviation over splits (not a
standard error). The system to beat is `none`: the frozen model with a temperature (a regression:
one scale) fitted on the same calibration rows. NLL in nats; the difference is the mean over test
rows of the same splits, below zero is better. OOD AUROC is by the module's own epistemic
uncertainty, where it has one, else by entropy: it is not the score that flags strange rows.

Worse than scaling alone by more than {margin} nats in the mean over splits: {worse}.
"""

_MAP_HEAD = """# Modules on maps

`python -m bench dense --out bench/results && python -m bench.table dense > docs/dense.md`
makes this page. {splits} seeded split{plural} by photo, mean ± standard deviation over splits (not
a standard error: the splits share photos). Every module makes a bundle as `hedged fit` does, and
the bundle is measured as `hedged evaluate` does, on the images of photos that the fit did not see.
The system to beat is `none`: the frozen model with one scale (segmentation: a temperature) fitted
on the same calibration images. Calibration errors, and the correlation where it says so, pool the
pixels of all images; other figures are means over images. Below zero, the difference is better.

- NLL is in nats, of a regression that of a Gaussian with the served standard deviation in each
  output of each pixel, on the scale 0–255, and UCE is in squares of that. A constant error bar has
  almost no UCE: read it beside AUSE (0 is the order of the errors themselves) and the correlation
  of σ with |error|.
- *Uncovered* is the share of an image's pixels outside their interval or set, promised to be at
  most {alpha:g} in the mean over new photos.
- GED² is of the label map to those of four annotators; a module that keeps the frozen labels has
  that of `none`.
- Networks that are sampled have {samples} samples here, fewer than by default, for time.
- *Test-time augmentation* (eight symmetries) and *dropout left on* (10 %, {samples} passes) are no
  modules: what users have without a fit. Their σ has no scale, so they have no NLL, UCE or
  intervals.
- Photos come from software packages and are cut into patches, the shapes of the segmentation are
  drawn on them: real pixels, but no sample of any deployment.
"""


def page(result: dict[str, Any]) -> str:
    """The page of a result of either benchmark."""
    return render_maps(result) if "sets" in result else render(result)


def render_maps(result: dict[str, Any]) -> str:
    """The page of ``python -m bench dense``."""
    head = {k: result[k] for k in ("splits", "alpha", "samples")}
    parts = [_MAP_HEAD.format(plural="" if result["splits"] == 1 else "s", **head)]
    for s in result["sets"]:
        rows = [r for r in result["table"] if r["set"] == s["set"]]
        randoms = [r["ause_random"] for r in rows if r["module"] == BASELINE]
        about = (
            f"{s['images']} images of {s['photos']} photos, {s['test_images']:.0f} of them to test "
            f"a split. AUSE of a random order: {randoms[0]:.3f}."
        )
        parts += [f"## {s['set']}", about, _lines(rows, _MAP_COLUMNS[s["task"]])]
    return "\n\n".join(parts) + "\n"


def render(result: dict[str, Any]) -> str:
    """The page of ``python -m bench heads``."""
    worse = ", ".join(result["worse"]) or "none"
    parts = [_HEAD.format(splits=result["splits"], margin=result["margin"], worse=worse)]
    parts += ["## In one table", *summary(result["table"])]
    for chosen in suite():
        rows = [r for r in result["table"] if r["set"] == chosen.name]
        if not rows:
            continue
        about = f"{chosen.about} ({chosen.task})."
        parts += [f"## {chosen.name}", about, _lines(rows, _COLUMNS[chosen.task])]
    return "\n\n".join(parts) + "\n"


def _lines(rows: Sequence[dict[str, Any]], known: Sequence[str]) -> str:
    """A line a module, with the columns that any of them has."""
    columns = [c for c in known if any(c in r for r in rows)]
    lines = [
        (_name(r["module"]), *(_cell(r, c) for c in columns), "; ".join(r.get("errors", ())))
        for r in sorted(rows, key=_order)
    ]
    return _table(("module", *(_TITLES[c] for c in columns), ""), lines)


def _name(module: str) -> str:
    """What no registry knows is no module, and has a name in words."""
    return f"*{module}*" if " " in module else f"`{module}`"


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
    decimals = 4 if abs(r[column]) < 10 else 2  # no more than are kept
    spread = f" ± {r.get(column + '_sd', 0.0):.{decimals}f}" if r["splits"] > 1 else ""
    return f"{r[column]:{sign}.{decimals}f}{spread}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line = "| " + " | ".join(titles) + " |"
    rule = "| " + " | ".join("---" for _ in titles) + " |"
    return "\n".join([line, rule, *("| " + " | ".join(r) + " |" for r in rows)])


if __name__ == "__main__":
    if sys.argv[1:] not in (["heads"], ["dense"]):
        sys.exit("usage: python -m bench.table heads|dense")
    if (found := kept(sys.argv[1])) is None:
        sys.exit(f"nothing of {sys.argv[1]} is kept in bench/results")
    print(page(found), end="")
