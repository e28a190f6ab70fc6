"""``hedged evaluate``: what a bundle's error bars are worth on labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.evaluation import Evaluation
    from calibration.evaluation.records import ClassFigures, Level

_CLASSES, _GROUPS = 20, 5
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

\b
Examples:
  hedged evaluate bundle --data fresh.parquet
  hedged evaluate bundle --data fresh.parquet \\
      --ood-data fonts=fonts.parquet -o evaluation

Each option is also a variable: HEDGED_EVALUATE_DEVICE for --device.
"""


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    data: Annotated[Path, option(help="Labelled rows, in the columns that the fit was given")],
    ood_data: Annotated[
        list[str] | None, option(help="name=PATH of strange rows, unlabelled (repeatable)")
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
    from calibration.report import write_report

    with console.progress() as report:
        found = run(
            bundle,
            data,
            ood_data=console.pairs(ood_data or [], "--ood-data"),
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
        if key.startswith("linearised"):
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
