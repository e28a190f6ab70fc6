"""Scoring a data set of any size: `score`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from calibration.predictor import Predictor
from posthoc.contract import DataError
from service.scoring.engine import LOCAL, Engine
from service.scoring.folder import SUCCESS, SUMMARY, begin, check_apart
from service.scoring.formats.format import Format, Pixels
from service.scoring.fragments import FRAGMENT_ROWS, Columns, list_fragments
from service.scoring.images import check_pixels, images_of
from service.scoring.job import Job
from service.scoring.labelled import label_columns
from service.scoring.manifest import Settings, describe_run
from service.scoring.measures import measures_of
from service.scoring.output import open_output, write_file
from service.scoring.places import open_place
from service.scoring.reading import Reader
from service.scoring.schema import chosen_fields, kept_columns, output_schema
from service.scoring.summary import Progress, Summary
from service.scoring.task import Plan, errors_name


def score(
    bundle: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    batch_size: int = 256,
    threads: int = 1,
    device: str = "cpu",
    engine: str = LOCAL,
    workers: int | None = None,
    num_gpus: float | None = None,
    alpha: float | None = None,
    max_error_ratio: float = 0.1,
    overwrite: bool = False,
    passthrough: Sequence[str] = (),
    outputs: Sequence[str] = (),
    labels: Sequence[str] = (),
    image_scale: float | None = None,
    image_mean: Sequence[float] = (),
    image_std: Sequence[float] = (),
    image_resize: tuple[int, int] | None = None,
    fragment_rows: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Predictions for files of one of the `service.scoring.formats`, as one Parquet file for each
    fragment.

    ``input`` is a file, a folder with all its sub-folders, a pattern of paths (``*``, ``**``) or a
    URL, ``output`` a folder or a URL (see `service.scoring.places`). What a float input takes of
    images is said by ``image_scale``, ``image_mean``, ``image_std`` and ``image_resize`` (height,
    width), see `service.scoring.formats.format.Pixels`.

    Killed at any moment and called again with the same arguments, it goes on after the last
    committed fragment and ends with the bytes of a run that was never killed. ``output`` then
    holds, below the input's own sub-folders, the columns of `output_schema` for each good row in
    order; the bad rows in ``_errors/`` (source, row, reason); ``_run.json``, ``_summary.json``,
    and ``_SUCCESS`` when no fragment failed. Rows are run in batches of ``batch_size`` counted
    from the start of their fragment, or as `service.scoring.images` says for a dense bundle;
    ``outputs`` are the fields to write, by default all; ``alpha`` None is the bundle's first level;
    ``labels`` are columns of the truth, from which ``_evaluation.json`` is made.
    ``engine`` ``ray`` has ``workers`` processes of a cluster do the same, each on ``threads`` cores
    and ``num_gpus`` devices. The engine and ``max_error_ratio``, which is of all rows, may differ
    when resuming, nothing else may.

    Raises DataError for an input or a column that cannot be used, BundleError for a bundle that
    cannot be trusted, ScoringError for an output that belongs to another run or cannot be
    written, ErrorRatioError beyond ``max_error_ratio``, and Interrupted when SIGTERM came (a
    fragment in hand is finished first). A damaged file stops nothing: it is in the summary; where
    it could not be opened at all it may be mended, and the same call goes on with it.
    """
    started = time.perf_counter()
    _check(batch_size, 1 if fragment_rows is None else fragment_rows, max_error_ratio)
    by = Engine(engine, device, threads, workers, num_gpus)
    predictor = by.open(bundle)
    predictor.self_check()
    if alpha is not None:
        predictor.q_hat(alpha)
    source, target = open_place(input), open_place(output)
    check_apart(source, target)
    mapping = predictor.manifest.mapping
    fields = chosen_fields(predictor.fields, outputs)
    images = images_of(predictor, fields)
    if fragment_rows is None:
        fragment_rows = FRAGMENT_ROWS if images is None else images.in_fragment()
    beside = label_columns(predictor.manifest, labels)
    scale = None if image_scale is None else float(image_scale)
    mean, std = (tuple(float(v) for v in values) for values in (image_mean, image_std))
    pixels = Pixels(scale, mean, std, image_resize)
    wanted = partial(_columns, predictor, passthrough, beside, pixels)
    listing = list_fragments(source, wanted, fragment_rows)
    kept = listing.columns.kept
    measures = measures_of(predictor, fields, alpha, labels, listing.schema)
    schema = output_schema(predictor.manifest, listing.schema, kept, fields)
    settings = Settings(
        batch_size=batch_size,
        threads=threads,
        provider=by.provider(predictor),
        alpha=predictor.manifest.alphas[0] if alpha is None else alpha,
        passthrough=tuple(passthrough),
        fragment_rows=fragment_rows,
        outputs=tuple(outputs),
        labels=tuple(labels),
        pixels=pixels,
    )
    manifest = describe_run(predictor.bundle, settings, schema, listing.sources)
    batch = batch_size if images is None else images.in_batch(batch_size)
    asked = {s.name for s in predictor.optional}
    group = mapping.group if "group" in asked and mapping.group in listing.schema.names else None
    filling = mapping.model_copy(update={"inputs": dict(listing.columns.filling)})
    reader = Reader(
        filling, predictor.inputs, kept, batch, images, group, "u" in asked, beside, pixels
    )
    identity = predictor.bundle.identity
    where = open_output(target)
    made = {name for f in listing.fragments for name in (f.name, errors_name(f))}
    where.make()
    with where.locked():
        begun = begin(where, manifest, made, overwrite=overwrite)
        plan = Plan(where, begun.run, identity, reader, schema, alpha, fields, measures)
        job = Job(plan, listing, max_error_ratio, progress)
        if begun != manifest:  # a mended file may have fewer bad rows than before
            where.remove(*map(errors_name, job.pending))
        job.begin()
        try:
            with job.until_sigterm():
                by.run(job, predictor)
        finally:
            where.tidy()  # lost workers leave parts, and so do those of a run killed just before
        reports = job.reports(predictor.manifest)
        for name, data in reports.files.items():
            write_file(where, name, data)
        summary = job.summary(predictor, started, reports)
        write_file(where, SUMMARY, summary.lasting())
        if not summary.failed:
            write_file(where, SUCCESS, b"")
    return summary


def _check(batch_size: int, fragment_rows: int, max_error_ratio: float) -> None:
    for name, value, least in (
        ("batch size", batch_size, 1),
        ("fragment size", fragment_rows, 1),
    ):
        if value < least:
            raise DataError(f"the {name} must be at least {least}, not {value}")
    if not 0 <= max_error_ratio <= 1:
        raise DataError(f"the error ratio must lie between 0 and 1, not {max_error_ratio}")


def _columns(
    predictor: Predictor,
    passthrough: Sequence[str],
    beside: Sequence[str],
    pixels: Pixels,
    form: Format,
    schema: pa.Schema,
) -> Columns:
    """Columns of the inputs and of what rows are measured by, and those that are copied."""
    check_pixels(form, pixels, predictor)
    mapping = predictor.manifest.mapping
    filling = form.fill(mapping.inputs, predictor.inputs, schema)
    inputs = tuple(c for columns in filling.values() for c in columns)
    needed = tuple(dict.fromkeys((*inputs, *beside)))
    kept = kept_columns(mapping, (*form.keys, *passthrough), schema)
    return Columns(needed, kept, filling)
