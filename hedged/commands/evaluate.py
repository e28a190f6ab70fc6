"""``hedged evaluate``: what a bundle's error bars are worth on labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from calibration.evaluation import Evaluation

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
            device=device,
            progress=report,
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(found.model_dump_json(indent=1))
    write_report(out / "report.html", found)
    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        show(found)
        console.out.print(f"report: {out / 'report.html'}")


evaluate.__doc__ = f"{evaluate.__doc__}\n\n{_MORE}"


def show(found: Evaluation) -> None:
    """The comparison, the coverage and the OOD scores as tables."""
    table = Table(title=f"{found.n:,} rows (95 % intervals)", title_justify="left")
    table.add_column("metric")
    for system in found.systems:
        table.add_column(system.name)
    for metric in found.systems[-1].metrics:
        figures = [system.metrics.get(metric) for system in found.systems]
        # No interval of a calibration error is right; what a perfect model would show is.
        perfect = any(f is not None and f.range == "perfect" for f in figures)
        ranges = [
            "" if f is None or f.low is None else f"{f.low:.4f}–{f.high:.4f}" for f in figures
        ]
        values = ["" if f is None else f"{f.value:.4f}" for f in figures]
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
    for level in found.levels:
        size = "infinite" if level.mean_size is None else f"{level.mean_size:.3g}"
        console.out.print(
            f"level {level.level}: coverage {level.coverage:.4f} "
            f"(luck allows {level.band_low:.4f}–{level.band_high:.4f}), mean size {size}"
        )
    for o in found.ood:
        console.out.print(
            f"{o.score} tells {o.out} ({o.n_out:,} rows) from clean rows: AUROC {o.auroc.value:.4f}"
        )
