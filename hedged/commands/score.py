"""``hedged score``: a bundle over a table of any size, exactly once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hedged.commands import console, options
from hedged.commands.console import option

if TYPE_CHECKING:
    from service.scoring.textfile import Textfile

_MORE = """Parquet, Arrow IPC, CSV, NDJSON, .npy, .npz or images; one kind at a time. One output
file for each input fragment. Kill it at any moment and run it again: it
goes on after the last committed fragment, and the output is byte for byte that of a run that was
never killed. Exit code 75: SIGTERM came, the fragment in hand was finished, run it again. Maps of
a dense bundle become tensor columns, or nested lists where images differ in size.

With --engine ray workers here, or on the cluster of RAY_ADDRESS, score the same files: bundle,
input and output then lie where every machine sees them. Either engine goes on with what the other
began.

With --labels rows that have a label, and that the fit did not see, are measured: accuracy,
calibration and coverage, with intervals, in _evaluation.json. How far the batch is from the
bundle's reference, which needs no label, is in _drift.json.

\b
Examples:
  hedged score bundle rows.parquet scored
  hedged score bundle rows/ scored --passthrough customer,day \\
      --max-error-ratio 0.01
  hedged score segmenter images/ scored --outputs label,confidence
  hedged score classifier photos/ scored --image-resize 224x224 \\
      --image-scale 255 --image-mean 0.485,0.456,0.406 \\
      --image-std 0.229,0.224,0.225
  hedged score bundle 'logs/*/rows-*.csv.gz' scored
  hedged score bundle s3://in/rows 's3://out/scored?region=eu-west-1'
  hedged score bundle rows/ scored --labels churned \\
      --textfile /var/lib/node_exporter/churn.prom
  hedged score bundle rows/ scored --engine ray --workers 4
  hedged score bundle rows/ scored --engine ray --device cuda \\
      --num-gpus 0.5

Each option is also a variable: HEDGED_SCORE_THREADS for --threads.
"""


def score(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    input: Annotated[str, typer.Argument(help="File, folder, pattern or URL")],
    output: Annotated[str, typer.Argument(help="Folder or URL to write")],
    alpha: Annotated[float | None, option(help="Miss rate; default: the bundle's first")] = None,
    batch_size: Annotated[int, option(help="Rows in one run of the model")] = 256,
    threads: Annotated[int, option(help="Threads of the model on the CPU; 0: one per core")] = 1,
    device: Annotated[str, option(help="auto, cpu, cuda[:n] or tensorrt")] = "cpu",
    engine: options.Engine = "local",
    workers: options.Workers = None,
    num_gpus: Annotated[
        float | None, option(help="GPUs of a worker of --engine ray; default with cuda: 1")
    ] = None,
    outputs: Annotated[str, option(help="Fields to write: a,b; default: all")] = "",
    passthrough: Annotated[str, option(help="Columns to copy to the output: a,b")] = "",
    image_scale: Annotated[float | None, option(help="Pixels are divided by this: 255")] = None,
    image_mean: Annotated[str, option(help="Then this is subtracted: a number, or r,g,b")] = "",
    image_std: Annotated[str, option(help="Then they are divided by this: r,g,b")] = "",
    image_resize: Annotated[str, option(help="Size of all images: HEIGHTxWIDTH")] = "",
    labels: Annotated[str, option(help="Column of the truth (a,b: of each output)")] = "",
    max_error_ratio: Annotated[float, option(help="Stop above this share of bad rows")] = 0.1,
    overwrite: Annotated[bool, option("--overwrite", help="Replace another run's output")] = False,
    textfile: Annotated[
        Path | None, option(help="Metrics for node_exporter's textfile collector: PATH.prom")
    ] = None,
    json: Annotated[bool, option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Score a data set of any size, exactly once."""
    from posthoc.contract import DataError
    from service.scoring import Progress
    from service.scoring import score as run
    from service.scoring.engine import Engine

    try:
        Engine(engine, device, threads, workers, num_gpus)
    except DataError as e:
        raise typer.BadParameter(str(e)) from None
    with _reporting(textfile, bundle, input, output) as file, console.progress("rows") as report:

        def tell(p: Progress) -> None:
            report("rows", p.rows_done, p.rows)
            if file is not None:
                file.tell(p)

        summary = run(
            bundle,
            input,
            output,
            batch_size=batch_size,
            threads=threads,
            device=device,
            engine=engine,
            workers=workers,
            num_gpus=num_gpus,
            alpha=alpha,
            max_error_ratio=max_error_ratio,
            overwrite=overwrite,
            passthrough=tuple(c for c in passthrough.split(",") if c),
            outputs=tuple(f for f in outputs.split(",") if f),
            labels=tuple(c for c in labels.split(",") if c),
            image_scale=image_scale,
            image_mean=console.numbers(image_mean, "--image-mean") if image_mean else (),
            image_std=console.numbers(image_std, "--image-std") if image_std else (),
            image_resize=_size(image_resize) if image_resize else None,
            progress=tell,
        )
        if file is not None:
            file.done(summary)
    if json:
        console.print_json(summary.as_dict())
    else:
        console.out.print(
            f"{summary.good:,} rows scored, {summary.errors:,} bad, in {summary.fragments} "
            f"fragments ({summary.resumed} from before), {summary.rows_per_s:,.0f} rows/s "
            f"→ {summary.output}"
        )
        for line in summary.lines:
            console.out.print(line, soft_wrap=True)
    for note in summary.notes:
        console.err.print(f"note: {note}")
    for failure in summary.failed:
        console.err.print(f"not read: {failure.source}: {failure.reason}")
    if summary.failed:
        raise typer.Exit(1)


def _reporting(
    path: Path | None, bundle: Path, input: str, output: str
) -> AbstractContextManager[Textfile | None]:
    if path is None:
        return nullcontext()
    from service.scoring.textfile import reporting

    return reporting(path, bundle=str(bundle), input=input, output=output)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise typer.BadParameter(f"--image-resize takes HEIGHTxWIDTH, not {text!r}")
    return int(height), int(width)


score.__doc__ = f"{score.__doc__}\n\n{_MORE}"
