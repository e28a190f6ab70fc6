"""Scoring a data set of any size on this machine: `score`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from calibration.predictor import Predictor
from posthoc.contract import DataError
from posthoc.data import TableMapping
from posthoc.runtime import provider_name
from service.scoring.folder import SUCCESS, SUMMARY, begin, check_apart
from service.scoring.fragments import FRAGMENT_ROWS, Columns, list_fragments
from service.scoring.images import images_of
from service.scoring.job import Job
from service.scoring.local import run_local
from service.scoring.manifest import Settings, describe_run
from service.scoring.output import open_output, write_file
from service.scoring.places import open_place
from service.scoring.reading import Reader
from service.scoring.schema import output_schema
from service.scoring.summary import Progress, Summary
from service.scoring.task import Plan


def score(
    bundle: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    batch_size: int = 256,
    threads: int = 1,
    device: str = "cpu",
    alpha: float | None = None,
    max_error_ratio: float = 0.1,
    overwrite: bool = False,
    passthrough: Sequence[str] = (),
    outputs: Sequence[str] = (),
    fragment_rows: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Predictions for a Parquet file or a folder of them, as one Parquet file for each fragment.

    Killed at any moment and called again with the same arguments, it goes on after the last
    committed fragment and ends with the bytes of a run that was never killed. ``output`` then
    holds, below the input's own sub-folders, the columns of `output_schema` for each good row in
    order; the bad rows in ``_errors/`` (source, row, reason); ``_run.json``, ``_summary.json``,
    and ``_SUCCESS`` when no fragment failed. Rows are run in batches of ``batch_size`` counted
    from the start of their fragment, or as `service.scoring.images` says for a dense bundle;
    ``outputs`` are the fields to write, by default all; ``alpha`` None is the bundle's first level;
    ``max_error_ratio`` is of all rows and may differ when resuming, nothing else may.

    Raises DataError for an input or a column that cannot be used, BundleError for a bundle that
    cannot be trusted, ScoringError for an output that belongs to another run or cannot be
    written, ErrorRatioError beyond ``max_error_ratio``, and Interrupted when SIGTERM came (a
    fragment in hand is finished first). A damaged file stops nothing: it is in the summary.
    """
    started = time.perf_counter()
    _check(batch_size, threads, 1 if fragment_rows is None else fragment_rows, max_error_ratio)
    predictor = Predictor(bundle, device=device, threads=threads)
    predictor.self_check()
    if alpha is not None:
        predictor.q_hat(alpha)
    source, target = open_place(input), open_place(output)
    check_apart(source, target)
    mapping = predictor.manifest.mapping
    fields = _fields(predictor, outputs)
    images = images_of(predictor, fields)
    if fragment_rows is None:
        fragment_rows = FRAGMENT_ROWS if images is None else images.in_fragment()
    listing = list_fragments(source, partial(_columns, mapping, tuple(passthrough)), fragment_rows)
    kept = listing.columns.kept
    schema = output_schema(predictor.manifest, listing.schema, kept, fields)
    settings = Settings(
        batch_size=batch_size,
        threads=threads,
        provider=provider_name(predictor.session),
        alpha=predictor.manifest.alphas[0] if alpha is None else alpha,
        passthrough=tuple(passthrough),
        fragment_rows=fragment_rows,
        outputs=tuple(outputs),
    )
    manifest = describe_run(predictor.bundle, settings, schema, listing.sources)
    batch = batch_size if images is None else images.in_batch(batch_size)
    asked = {s.name for s in predictor.optional}
    group = mapping.group if "group" in asked and mapping.group in listing.schema.names else None
    reader = Reader(mapping, predictor.inputs, kept, batch, images, group, "u" in asked)
    identity = predictor.bundle.identity
    where = open_output(target)
    plan = Plan(where, manifest.run, identity, reader, schema, alpha, fields)
    where.make()
    with where.locked():
        begin(where, manifest, overwrite=overwrite)
        job = Job(plan, listing, max_error_ratio, progress)
        job.begin()
        with job.until_sigterm():
            run_local(job, predictor)
        summary = job.summary(predictor, started)
        write_file(where, SUMMARY, summary.lasting())
        if not summary.failed:
            write_file(where, SUCCESS, b"")
    return summary


def _check(batch_size: int, threads: int, fragment_rows: int, max_error_ratio: float) -> None:
    for name, value, least in (
        ("batch size", batch_size, 1),
        ("number of threads", threads, 0),
        ("fragment size", fragment_rows, 1),
    ):
        if value < least:
            raise DataError(f"the {name} must be at least {least}, not {value}")
    if not 0 <= max_error_ratio <= 1:
        raise DataError(f"the error ratio must lie between 0 and 1, not {max_error_ratio}")


def _fields(predictor: Predictor, outputs: Sequence[str]) -> tuple[str, ...]:
    """The fields to write, in the order of the contract."""
    for name in outputs:
        if name not in predictor.fields:
            raise DataError(f"the bundle gives no {name!r}; it gives {', '.join(predictor.fields)}")
    return tuple(f for f in predictor.fields if not outputs or f in outputs)


def _columns(mapping: TableMapping, passthrough: tuple[str, ...], schema: pa.Schema) -> Columns:
    """Input columns, and what is copied: the mapping's id where there is one, and passthrough."""
    ids = (mapping.id,) if mapping.id is not None and mapping.id in schema.names else ()
    needed = tuple(c for columns in mapping.inputs.values() for c in columns)
    return Columns(tuple(dict.fromkeys(needed)), tuple(dict.fromkeys((*ids, *passthrough))))
