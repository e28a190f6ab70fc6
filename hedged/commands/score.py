"""``hedged score``: a bundle over a table of any size, exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedged.commands import console
from hedged.commands.console import option

_MORE = """One output file for each input fragment. Kill it at any moment and run it again: it
goes on after the last committed fragment, and the output is byte for byte that of a run that was
never killed. Exit code 75: SIGTERM came, the fragment in hand was finished, run it again. Maps of
a dense bundle become tensor columns, or nested lists where images differ in size.

\b
Examples:
  hedged score bundle rows.parquet scored
  hedged score bundle rows/ scored --passthrough customer,day \\
      --max-error-ratio 0.01
  hedged score segmenter images/ scored --outputs label,confidence

Each option is also a variable: HEDGED_SCORE_THREADS for --threads.
"""


def score(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    input: Annotated[Path, typer.Argument(help="Parquet file, or folder of them")],
    output: Annotated[Path, typer.Argument(help="Folder to write")],
    alpha: Annotated[float | None, option(help="Miss rate; default: the bundle's first")] = None,
    batch_size: Annotated[int, option(help="Rows in one run of the model")] = 256,
    threads: Annotated[int, option(help="Threads of the model on the CPU; 0: one per core")] = 1,
    device: Annotated[str, option(help="auto, cpu, cuda[:n] or tensorrt")] = "cpu",
    outputs: Annotated[str, option(help="Fields to write: a,b; default: all")] = "",
    passthrough: Annotated[str, option(help="Columns to copy to the output: a,b")] = "",
    max_error_ratio: Annotated[float, option(help="Stop above this share of bad rows")] = 0.1,
    overwrite: Annotated[bool, option("--overwrite", help="Replace another run's output")] = False,
    json: Annotated[bool, option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Score a Parquet data set of any size, exactly once."""
    from service.scoring import Progress
    from service.scoring import score as run

    with console.progress() as report:

        def tell(p: Progress) -> None:
            report("rows", p.rows_done, p.rows)

        summary = run(
            bundle,
            input,
            output,
            batch_size=batch_size,
            threads=threads,
            device=device,
            alpha=alpha,
            max_error_ratio=max_error_ratio,
            overwrite=overwrite,
            passthrough=tuple(c for c in passthrough.split(",") if c),
            outputs=tuple(f for f in outputs.split(",") if f),
            progress=tell,
        )
    if json:
        console.print_json(summary.as_dict())
    else:
        console.out.print(
            f"{summary.good:,} rows scored, {summary.errors:,} bad, in {summary.fragments} "
            f"fragments ({summary.resumed} from before), {summary.rows_per_s:,.0f} rows/s "
            f"→ {summary.output}"
        )
    for note in summary.notes:
        console.err.print(f"note: {note}")
    for failure in summary.failed:
        console.err.print(f"not read: {failure.source}: {failure.reason}")
    if summary.failed:
        raise typer.Exit(1)


score.__doc__ = f"{score.__doc__}\n\n{_MORE}"
