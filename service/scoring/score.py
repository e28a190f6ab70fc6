"""Scoring a data set of any size on this machine: `score`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from calibration.predictor import Predictor
from posthoc.contract import DataError
from posthoc.data import TableMapping
from posthoc.runtime import provider_name
from service.scoring.commit import locked, make_folder, remove, write_file, writing
from service.scoring.errors import DamageError, ErrorRatioError, Interrupted
from service.scoring.folder import SUCCESS, SUMMARY, begin, check_apart
from service.scoring.fragments import FRAGMENT_ROWS, Columns, Fragment, Listing, list_fragments
from service.scoring.images import images_of
from service.scoring.manifest import Settings, describe_run
from service.scoring.reading import Reader, read_ahead, read_blocks
from service.scoring.schema import output_schema
from service.scoring.summary import Failure, Progress, Summary
from service.scoring.task import Plan, committed, score_fragment


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
    check_apart(Path(input), Path(output))
    mapping = predictor.manifest.mapping
    fields = _fields(predictor, outputs)
    images = images_of(predictor, fields)
    if fragment_rows is None:
        fragment_rows = FRAGMENT_ROWS if images is None else images.in_fragment()
    listing = list_fragments(input, partial(_columns, mapping, tuple(passthrough)), fragment_rows)
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
    plan = Plan(Path(output), manifest.run, identity, reader, schema, alpha, fields)
    with writing(plan.output):
        make_folder(plan.output)
    with locked(plan.output):
        begin(plan.output, manifest, overwrite=overwrite)
        job = _Job(predictor, plan, listing, max_error_ratio, progress)
        job.run()
        summary = job.summary(started)
        write_file(plan.output / SUMMARY, summary.lasting())
        if not summary.failed:
            write_file(plan.output / SUCCESS, b"")
    return summary


class _Job:
    """The fragments of one run, one after the other; reading and writing overlap with scoring."""

    def __init__(
        self,
        predictor: Predictor,
        plan: Plan,
        listing: Listing,
        max_error_ratio: float,
        progress: Callable[[Progress], None] | None,
    ):
        self._predictor = predictor
        self._plan = plan
        self._listing = listing
        self._ratio = max_error_ratio
        # Rounding first: .29 * 100 lies a hair below 29 in floating point.
        self._limit = int(round(max_error_ratio * listing.rows, 6))
        self._progress = progress
        self._failed = [Failure(s.name, None, None, s.problem) for s in listing.unreadable]
        found = [(f, committed(f, plan)) for f in listing.fragments]
        self._pending = [f for f, outcome in found if outcome is None]
        self._outcomes = [outcome for _, outcome in found if outcome is not None]
        self._resumed = len(self._outcomes)
        self._rows_before = self._rows_seen = sum(o.good + o.bad for o in self._outcomes)

    def run(self) -> None:
        """Score every fragment that is not committed yet."""
        self._check_errors(None)
        if self._pending:
            for name in (SUCCESS, SUMMARY):
                remove(self._plan.output / name)
        with (
            ThreadPoolExecutor(1, "read") as reading,
            ThreadPoolExecutor(1, "write") as writer,
            _sigterm() as stop,
        ):
            streams = (
                read_ahead(reading, read_blocks(f, self._plan.reader)) for f in self._pending
            )
            upcoming = next(streams, iter(()))
            for fragment in self._pending:
                if stop.is_set():
                    raise Interrupted(
                        f"stopped by SIGTERM after {len(self._outcomes)} of "
                        f"{len(self._listing.fragments)} fragments; the same command goes on"
                    )
                blocks, upcoming = upcoming, next(streams, iter(()))
                seen = self._rows_seen
                try:
                    self._outcomes.append(
                        score_fragment(
                            self._predictor,
                            fragment,
                            self._plan,
                            blocks,
                            allowed_bad=self._limit - self._bad,
                            pool=writer,
                            on_rows=self._on_rows,
                        )
                    )
                except ErrorRatioError as e:
                    self._check_errors(e)
                except DamageError as e:
                    self._failed.append(_failure(fragment, e))
                    self._rows_seen = seen + fragment.rows
                self._tell()

    def summary(self, started: float) -> Summary:
        """What the run did."""
        seconds = time.perf_counter() - started
        return Summary(
            run=self._plan.run,
            bundle=self._plan.bundle,
            rows=self._listing.rows,
            good=sum(o.good for o in self._outcomes),
            errors=self._bad,
            fragments=len(self._listing.fragments) + len(self._listing.unreadable),
            failed=tuple(self._failed),
            resumed=self._resumed,
            seconds=seconds,
            rows_per_s=(self._rows_seen - self._rows_before) / seconds,
            output=str(self._plan.output),
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        """Groups that the bundle has thresholds for and the input does not name."""
        column = self._predictor.manifest.mapping.group
        asked = "group" in {s.name for s in self._predictor.optional}
        if not asked or self._plan.reader.group is not None:
            return ()
        return (
            f"the input has no column {column!r}: every row had the threshold of all rows, and "
            "nothing is promised of groups",
        )

    @property
    def _bad(self) -> int:
        return sum(o.bad for o in self._outcomes)

    def _check_errors(self, beyond: ErrorRatioError | None) -> None:
        if beyond is not None or self._bad > self._limit:
            detail = "" if beyond is None else f" ({beyond})"
            raise ErrorRatioError(
                f"more than {self._limit:,} of {self._listing.rows:,} rows are bad{detail}, and "
                f"--max-error-ratio is {self._ratio}; mend the input, or raise the ratio and run "
                "the same command to go on"
            ) from beyond

    def _on_rows(self, count: int) -> None:
        self._rows_seen += count
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            done = len(self._outcomes) + len(self._failed)
            total = len(self._listing.fragments) + len(self._listing.unreadable)
            self._progress(Progress(done, total, self._rows_seen, self._listing.rows))


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


def _failure(fragment: Fragment, error: DamageError) -> Failure:
    return Failure(fragment.source.name, fragment.first_row, fragment.rows, str(error))


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process, while the block runs."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can take signals
        return

    def on_signal(*_: Any) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
