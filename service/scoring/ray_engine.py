"""The engine of a cluster: Ray workers score the same fragments by the same task.

The driver lists, begins and ends the run, and hands a worker its next fragment when it has done the
last; a fragment whose worker is lost is given to another one. What a fragment's file holds does not
depend on who made it, so a run begun by one engine can be gone on with by the other.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from calibration.predictor import Predictor
from posthoc.contract import HedgedError
from service.scoring.cluster import WorkersLostError, connect
from service.scoring.errors import DamageError, ErrorRatioError, ScoringError
from service.scoring.fragments import Fragment
from service.scoring.job import Job
from service.scoring.manifest import RUN, run_id, versions
from service.scoring.reading import read_ahead, read_blocks
from service.scoring.task import Outcome, Plan, score_fragment

Result = Outcome | DamageError | ErrorRatioError


def run_ray(
    job: Job,
    bundle: Path,
    *,
    device: str,
    threads: int,
    workers: int | None = None,
    gpus: float = 0,
) -> None:
    """Score every fragment of the job that is not committed yet, by at most ``workers`` processes
    of ``threads`` cores and ``gpus`` devices each; default: as many as the cluster has room for.

    Raises what `run_local` does, ClusterError where Ray does not start, and ScoringError where a
    machine lacks something or ends its workers over one fragment.
    """
    if not job.pending:
        return
    scorer = Scorer(job.plan, bundle.absolute(), device, threads, versions())
    left = len(job.pending)
    with connect(workers, cpus=max(1, threads), gpus=gpus, pieces=left) as mapper:
        try:
            with closing(mapper.as_done(scorer, _handed(job), lambda: job.stopped)) as results:
                for (fragment, _), result in results:
                    left -= 1
                    _tell(job, fragment, result)
        except WorkersLostError as e:
            fragment, _ = e.item
            raise ScoringError(
                f"{fragment.source.place}, rows {fragment.first_row:,} to "
                f"{fragment.first_row + fragment.rows:,}: {e}"
            ) from e
    if left:
        job.go_on()


def _handed(job: Job) -> Iterator[tuple[Fragment, int]]:
    """Fragments, each with how many more rows may be bad when it is handed out."""
    for fragment in job.pending:
        yield fragment, job.allowed_bad


def _tell(job: Job, fragment: Fragment, result: Result) -> None:
    match result:
        case Outcome():
            job.on_rows(fragment.rows)
            job.done(fragment, result)
        case DamageError():
            job.damaged(fragment, result, 0)
        case ErrorRatioError():
            job.too_many(result)


@dataclass(slots=True)
class Scorer:
    """Scores fragments in a process of the cluster, which opens the bundle at the first of them.

    ``versions`` are those of the software of the driver.
    """

    plan: Plan
    bundle: Path
    device: str
    threads: int
    versions: Mapping[str, str]
    _predictor: Predictor | None = field(default=None, init=False)

    def __call__(self, task: tuple[Fragment, int]) -> Result:
        """What became of a fragment, of whose rows so many may be bad.

        Raises ScoringError where this machine does not see what the driver sees.
        """
        fragment, allowed_bad = task
        if self._predictor is None:
            self._predictor = self._open(fragment)
        with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writer:
            try:
                return score_fragment(
                    self._predictor,
                    fragment,
                    self.plan,
                    read_ahead(reading, read_blocks(fragment, self.plan.reader)),
                    allowed_bad=allowed_bad,
                    pool=writer,
                    on_rows=_ignore,
                )
            except (DamageError, ErrorRatioError) as e:
                return e

    def _open(self, fragment: Fragment) -> Predictor:
        self._check_place(fragment)
        try:
            predictor = Predictor(self.bundle, device=self.device, threads=self.threads)
            predictor.self_check()
        except HedgedError as e:
            raise ScoringError(f"{_here()}: {e}") from e
        identity = predictor.bundle.identity
        if identity != self.plan.bundle:
            raise ScoringError(
                f"{_here()}: {self.bundle} is bundle {identity}, and the run was begun with "
                f"{self.plan.bundle}; all machines need the same one, and it may not be replaced "
                "during a run"
            )
        return predictor

    def _check_place(self, fragment: Fragment) -> None:
        """Raise ScoringError where this machine has other software, another input or output."""
        here = versions()
        for name, version in self.versions.items():
            if here.get(name) != version:
                raise ScoringError(
                    f"{_here()}: {name} is {here.get(name)} there and {version} where the run was "
                    "begun; install the same everywhere"
                )
        shared = "use a folder that every machine of the cluster sees, or an object store"
        try:
            with self.plan.output.open(RUN) as file:
                found = run_id(file.read())
        except OSError:
            found = None
        if found != self.plan.run:
            raise ScoringError(
                f"{_here()} does not see this run in the output {self.plan.output.text}; {shared}"
            )
        place = fragment.source.place
        try:
            seen = place.info().type == pafs.FileType.File
        except OSError:
            seen = False
        if not seen:
            raise ScoringError(f"{_here()} does not see the input {place}; {shared}")


def _here() -> str:
    return f"the worker on {socket.gethostname()}"


def _ignore(rows: int) -> None:
    """A fragment's rows are told by the driver, when it is done."""
