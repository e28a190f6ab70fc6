"""The engine of one process: fragment after fragment; reading and writing overlap with scoring."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from calibration.predictor import Predictor
from service.scoring.errors import DamageError, ErrorRatioError
from service.scoring.job import Job
from service.scoring.reading import read_ahead, read_blocks
from service.scoring.task import score_fragment


def run_local(job: Job, predictor: Predictor) -> None:
    """Score every fragment of the job that is not committed yet."""
    with (
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        streams = (read_ahead(reading, read_blocks(f, job.plan.reader)) for f in job.pending)
        upcoming = next(streams, iter(()))
        for fragment in job.pending:
            job.go_on()
            blocks, upcoming = upcoming, next(streams, iter(()))
            seen = 0

            def on_rows(count: int) -> None:
                nonlocal seen
                seen += count
                job.on_rows(count)

            try:
                outcome = score_fragment(
                    predictor,
                    fragment,
                    job.plan,
                    blocks,
                    allowed_bad=job.allowed_bad,
                    pool=writer,
                    on_rows=on_rows,
                )
            except ErrorRatioError as e:
                job.too_many(e)
            except DamageError as e:
                job.damaged(fragment, e, seen)
            else:
                job.done(fragment, outcome)
