"""How far a run is: what is committed, what failed, and what is left, whichever engine does it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from calibration.bundle import Manifest
from calibration.predictor import Predictor
from service.scoring.errors import DamageError, ErrorRatioError, Interrupted
from service.scoring.folder import DONE
from service.scoring.fragments import Fragment, Listing
from service.scoring.measures import Reports, reports_of
from service.scoring.summary import Failure, Progress, Summary
from service.scoring.task import Outcome, Plan, committed


class Job:
    """The fragments of one run. An engine scores those in ``pending`` and tells what became of
    each; it asks `go_on` before it begins one."""

    def __init__(
        self,
        plan: Plan,
        listing: Listing,
        max_error_ratio: float,
        progress: Callable[[Progress], None] | None,
    ):
        self.plan = plan
        self._listing = listing
        self._ratio = max_error_ratio
        # Rounding first: .29 * 100 lies a hair below 29 in floating point.
        self._limit = int(round(max_error_ratio * listing.rows, 6))
        self._progress = progress
        self._stop = threading.Event()
        self._failed = [Failure(s.name, None, None, s.problem) for s in listing.unreadable]
        found = [(f, committed(f, plan)) for f in listing.fragments]
        self.pending = [f for f, outcome in found if outcome is None]
        self._outcomes = {f.name: outcome for f, outcome in found if outcome is not None}
        self._resumed = len(self._outcomes)
        self._rows_before = self._rows_seen = sum(o.good + o.bad for o in self._outcomes.values())

    def begin(self) -> None:
        """Raise ErrorRatioError if too many rows are bad already; say that the run is not done."""
        self._check_errors(None)
        if self.pending:
            self.plan.output.remove(*DONE)

    @property
    def stopped(self) -> bool:
        """Whether SIGTERM came."""
        return self._stop.is_set()

    def go_on(self) -> None:
        """Raise Interrupted once SIGTERM came."""
        if self.stopped:
            raise Interrupted(
                f"stopped by SIGTERM after {len(self._outcomes)} of "
                f"{len(self._listing.fragments)} fragments; the same command goes on"
            )

    @property
    def allowed_bad(self) -> int:
        """How many more rows may be bad."""
        return self._limit - self._bad

    def done(self, fragment: Fragment, outcome: Outcome) -> None:
        """A fragment is committed. Raises ErrorRatioError when its bad rows are too many."""
        self._outcomes[fragment.name] = outcome
        self._check_errors(None)
        self._tell()

    def damaged(self, fragment: Fragment, error: DamageError, rows_seen: int) -> None:
        """A fragment cannot be decoded; ``rows_seen`` of its rows were told to `on_rows`."""
        failure = Failure(fragment.source.name, fragment.first_row, fragment.rows, str(error))
        self._failed.append(failure)
        self.on_rows(fragment.rows - rows_seen)

    def too_many(self, error: ErrorRatioError) -> None:
        """A fragment has more bad rows than are allowed: raises ErrorRatioError for the run."""
        self._check_errors(error)

    def on_rows(self, count: int) -> None:
        """So many more rows were scored."""
        self._rows_seen += count
        self._tell()

    @contextmanager
    def until_sigterm(self) -> Iterator[None]:
        """While inside, SIGTERM makes `go_on` raise instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can take signals
            return

        def on_signal(*_: Any) -> None:
            self._stop.set()

        before = signal.signal(signal.SIGTERM, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def reports(self, manifest: Manifest) -> Reports:
        """What was measured beside the rows, whoever scored them and in whatever order."""
        outcomes = (self._outcomes.get(f.name) for f in self._listing.fragments)
        return reports_of(
            self.plan.measures,
            manifest,
            {"run": self.plan.run, "bundle": self.plan.bundle},
            (o.measured for o in outcomes if o is not None),
        )

    def summary(self, predictor: Predictor, started: float, reports: Reports) -> Summary:
        """What the run did since ``started``, of `time.perf_counter`."""
        seconds = time.perf_counter() - started
        return Summary(
            run=self.plan.run,
            bundle=self.plan.bundle,
            rows=self._listing.rows,
            good=sum(o.good for o in self._outcomes.values()),
            errors=self._bad,
            fragments=len(self._listing.fragments) + len(self._listing.unreadable),
            failed=tuple(sorted(self._failed, key=_place)),
            resumed=self._resumed,
            seconds=seconds,
            rows_per_s=(self._rows_seen - self._rows_before) / seconds,
            output=self.plan.output.text,
            notes=_notes(predictor, self.plan),
            lines=reports.lines,
            evaluation=reports.evaluation,
            drift=reports.drift,
        )

    @property
    def _bad(self) -> int:
        return sum(o.bad for o in self._outcomes.values())

    def _check_errors(self, beyond: ErrorRatioError | None) -> None:
        if beyond is not None or self._bad > self._limit:
            detail = "" if beyond is None else f" ({beyond})"
            raise ErrorRatioError(
                f"more than {self._limit:,} of {self._listing.rows:,} rows are bad{detail}, and "
                f"--max-error-ratio is {self._ratio}; mend the input and start again with "
                "--overwrite, or raise the ratio and run the same command to go on"
            ) from beyond

    def _tell(self) -> None:
        if self._progress is not None:
            done = len(self._outcomes) + len(self._failed)
            total = len(self._listing.fragments) + len(self._listing.unreadable)
            rows = self._rows_seen, self._listing.rows
            self._progress(Progress(done, total, *rows, self._bad, len(self._failed)))


def _place(failure: Failure) -> tuple[str, int]:
    return failure.source, failure.first_row or 0


def _notes(predictor: Predictor, plan: Plan) -> tuple[str, ...]:
    """Groups that the bundle has thresholds for and the input does not name."""
    column = predictor.manifest.mapping.group
    asked = "group" in {s.name for s in predictor.optional}
    if not asked or plan.reader.group is not None:
        return ()
    return (
        f"the input has no column {column!r}: every row had the threshold of all rows, and "
        "nothing is promised of groups",
    )
