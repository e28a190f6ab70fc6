"""``hedged evaluate``: what a bundle's error bars are worth on labelled rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.evaluation import Evaluation
    from calibration.evaluation.records import ClassFigures, Level

_CLASSES, _GROUPS = 20, 5
_COMPARED = {
    "accuracy": "acc.",
    "mean_iou": "IoU",
    "rmse": "RMSE",
    "nll": "NLL",
    "debiased_ece": "debiased ECE",
    "pce": "PCE",
}
FIRST = "data"  # a set without a name
# Of rows, what the report holds besides: the table is for a first look.
_REPORTED = {
    "equal_mass_ece",
    "top_label_ece",
    "ks_error",
    "class_ece",
    "brier_reliability",
    "brier_resolution",
    "brier_uncertainty",
    "e_aurc",
}
_MORE = """Rows that the fit saw are dropped and counted; its own test rows are not.
The first --data is what every figure is of; further ones, and the first one
spoilt by --corrupt, stand beside it.

\b
Examples:
  hedged evaluate bundle --data fresh.parquet
  hedged evaluate bundle --data fresh.parquet \\
      --ood-data fonts=fonts.parquet -o evaluation
  hedged evaluate bundle --data clean=a.parquet --data shifted=b.parquet
  hedged evaluate bundle --data fresh.parquet --corrupt noise,missing \\
      --severity 1,2,3

Each option is also a variable: HEDGED_EVALUATE_DEVICE for --device.
"""


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    data: Annotated[
        list[str],
        option(
            metavar="[NAME=]PATH",
            help="Labelled rows, in the columns that the fit was given (repeatable)",
        ),
    ],
    ood_data: Annotated[
        list[str] | None, option(help="name=PATH of strange rows, unlabelled (repeatable)")
    ] = None,
    corrupt: Annotated[
        str | None,
        option(
            help="Corruptions of the first set: all, or of images noise, blur, occlusion, "
            "contrast; of tables missing, noise, scaled, shuffled; of tokens tokens"
        ),
    ] = None,
    severity: Annotated[
        str | None, option(help="How strong, 1 to 5, with --corrupt (1,3,5)", metavar="LIST")
    ] = None,
    out: Annotated[
        Path, option("--out", "-o", help="Folder of report.html and evaluation.json")
    ] = Path("evaluation"),
    data_range: Annotated[
        float | None, option(help="Range of a restored image's values, for PSNR: 1, 255")
    ] = None,
    device: Annotated[str, option(help="auto, cpu, cuda[:n] or tensorrt")] = "cpu",
    json: Annotated[bool, option("--json", help="Print every figure as JSON")] = False,
) -> None:
    """Measure a bundle on labelled rows and write a report."""
    from calibration.evaluate import evaluate as run
    from calibration.evaluation.corrupted import DEFAULT
    from calibration.report import write_report

    if severity is not None and corrupt is None:
        raise typer.BadParameter("--severity belongs to --corrupt")
    sets = named_sets(data)
    severities = DEFAULT if severity is None else _severities(severity)
    with console.progress() as report:
        found = run(
            bundle,
            sets,
            ood_data=console.pairs(ood_data or [], "--ood-data"),
            corrupt=() if corrupt is None else [c.strip() for c in corrupt.split(",")],
            severities=severities,
            data_range=data_range,
            device=device,
            progress=report,
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(found.model_dump_json(indent=1))
    write_report(out / "report.html", found)
    if json:
        console.print_json(found.model_dump(mode="json", exclude={"dense": {"pictures"}}))
    else:
        show(found)
        console.out.print(f"report: {out / 'report.html'}")


evaluate.__doc__ = f"{evaluate.__doc__}\n\n{_MORE}"


def named_sets(values: Sequence[str]) -> dict[str, str]:
    """``[name=]PATH`` options by name, in order; a set without a name is called data.

    What is a path as it stands, or a URL, is one, whatever equals signs it holds. A usage error for
    two sets of one name.
    """
    found: dict[str, str] = {}
    for value in values:
        name, path = FIRST, value
        before, sign, rest = value.partition("=")
        whole = not sign or "/" in before or os.sep in before or Path(value).exists()
        if not whole:
            if not before or not rest:
                raise typer.BadParameter(f"--data takes PATH or name=PATH, not {value!r}")
            name, path = before, rest
        if name in found:
            raise typer.BadParameter(
                f"two sets are called {name!r} ({found[name]} and {path}); give each its name: "
                "--data clean=a.parquet --data shifted=b.parquet"
            )
        found[name] = path
    return found


def _severities(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(v) for v in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--severity takes numbers like 1,3,5, not {text!r}") from None


def show(found: Evaluation) -> None:
    """The comparison, the coverage and the OOD scores as tables."""
    from calibration.evaluation.images import PIXELS

    what = "rows" if found.dense is None else "images"
    table = Table(title=f"{found.n:,} {what} (95 % intervals)", title_justify="left")
    table.add_column("metric")
    for system in found.systems:
        table.add_column(system.name)
    for metric in found.systems[-1].metrics:
        if found.dense is None and metric in _REPORTED:
            continue
        figures = [system.metrics.get(metric) for system in found.systems]
        # No interval of a calibration error is right; what a perfect model would show is.
        perfect = any(f is not None and f.range == "perfect" for f in figures)
        form = ".4g" if metric == "uce" else ".4f"  # squared units may be tiny
        ranges = [
            "" if f is None or f.low is None else f"{f.low:{form}}–{f.high:{form}}" for f in figures
        ]
        values = ["" if f is None else f"{f.value:{form}}" for f in figures]
        if perfect:
            table.add_row(metric, *values)
            table.add_row("  if it were calibrated", *ranges)
        else:
            pairs = zip(values, ranges, strict=True)
            table.add_row(metric, *(f"{v} ({r})" if r else v for v, r in pairs))
    console.out.print(table)
    for key, text in found.about.items():
        if key.startswith("linearised") or key == "rows":
            console.out.print(f"{key}: {text}")
    if found.dense is not None and found.dense.classes:
        console.out.print(_classes(found.dense.classes))
    for level in found.levels:
        size = "infinite" if level.mean_size is None else f"{level.mean_size:.3g}"
        band = f" (luck allows {level.band_low:.4f}–{level.band_high:.4f})" * level.banded
        console.out.print(
            f"level {level.level}: coverage {level.coverage:.4f}{band}, mean size {size}"
            f"{_spread(level)}"
        )
        for part in level.groups[:_GROUPS]:
            console.out.print(
                f"  {part.name}: coverage {part.coverage:.4f} of {part.n:,} "
                f"(luck allows {part.band_low:.4f}–{part.band_high:.4f})",
                markup=False,
            )
        if len(level.groups) > _GROUPS:
            console.out.print("  (the least covered groups; more are in the report)")
    for o in found.ood:
        of = "pixels" if o.score.endswith(PIXELS.format("")) else what
        console.out.print(
            f"{o.score} tells {o.out} ({o.n_out:,} {of}) from clean {of}: AUROC {o.auroc.value:.4f}"
        )

    if found.sets:
        console.out.print(_sets(found))
        console.out.print(
            "coverage is promised for rows like those of the fit; of other sets it is measured"
        )


def _sets(found: Evaluation) -> Table:
    """The labelled sets beside each other."""
    table = Table(title="sets side by side", title_justify="left")
    first = found.sets[0]
    metrics = [m for m in _COMPARED if m in first.metrics]
    table.add_column("set", no_wrap=True)
    covered = [f"in {v.level}" for v in first.levels]
    shares = ("size", "OOD", "abstain", "answers", "error")
    for column in ("n", *(_COMPARED[m] for m in metrics), *covered, *shares):
        table.add_column(column, justify="right")
    for s in found.sets:
        sizes = [v.mean_size for v in s.levels[:1]]
        table.add_row(
            escape(s.name),
            f"{s.n:,}",
            *(f"{s.metrics[m].value:{'.4g' if m == 'rmse' else '.3f'}}" for m in metrics),
            *(f"{v.coverage:.3f}" for v in s.levels),
            "" if not sizes else "inf" if sizes[0] is None else f"{sizes[0]:.3g}",
            *(
                "" if f is None else f"{f.value:.3f}"
                for f in (s.flagged, s.abstained, s.answered, s.answered_error)
            ),
        )
    return table


def _classes(classes: Sequence[ClassFigures]) -> Table:
    """The classes of a segmentation, the most frequent first."""
    table = Table(title=f"the {min(len(classes), _CLASSES)} most frequent classes")
    names = list(classes[0].ece)
    for column in ("class", "share of pixels", "IoU", *(f"ECE, {n}" for n in names)):
        table.add_column(column)
    for c in sorted(classes, key=lambda c: -c.share)[:_CLASSES]:
        iou = "" if c.iou is None else f"{c.iou:.4f}"
        table.add_row(c.name, f"{c.share:.4f}", iou, *(f"{c.ece[n]:.4f}" for n in names))
    return table


def _spread(level: Level) -> str:
    """Of a dense model, the uncovered pixels by image."""
    if level.images is None:
        return ""
    mean, above, mask = level.images.mean, level.images.above, level.images.mask
    what, of = ("uncovered", "pixels") if mask is None else ("missed", f"pixels of {mask}")
    return (
        f"; {what} {mean.value:.4f} ({mean.low:.4f}–{mean.high:.4f}) of an image's {of}, "
        f"more than {level.alpha:g} in {above.value:.4f} of the images"
    )
