"""Labels meet their predictions, and the counters move."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from posthoc.contract import F64
from service import instruments
from service.labels import Joined, totals_of
from service.ledger import Ledger
from service.store import CHUNK

log = logging.getLogger(__name__)

EXPIRE_AFTER_S = 30 * 86_400.0  # a label that finds no prediction in this time is given up
_TIDY_S = 3600.0  # between two looks for what is too old


class Joiner:
    """Claims labels that found their prediction and moves the counters, in a thread of its own.

    It also removes what is too old: labels without a prediction after ``expire_after_s`` and,
    unless ``retain_s`` is None, predictions and their labels after ``retain_s`` seconds.

    Every service worker runs one. The claim is committed before the counters move, so a crash in
    between may lose those increments but never doubles them; ``Ledger.calibration`` stays exact.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        interval_s: float = 0.5,
        claim_rows: int = 1000,
        expire_after_s: float = EXPIRE_AFTER_S,
        retain_s: float | None = None,
    ) -> None:
        self._ledger = ledger
        self._interval_s = interval_s
        self._claim_rows = claim_rows
        self._expire_after_s = expire_after_s if retain_s is None else min(expire_after_s, retain_s)
        self._retain_s = retain_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin joining every ``interval_s`` seconds."""
        self._thread = threading.Thread(target=self._run, name="hedged-joiner", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the claim in progress and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def step(self) -> int:
        """Join everything that can be joined now; the number of rows joined."""
        total = 0
        while rows := self._ledger.claim(self._claim_rows):
            move_counters(rows)
            total += len(rows)
            if self._stop.is_set():
                break
        return total

    def tidy(self) -> bool:
        """Remove one part of what is too old, in two short transactions; whether more is left."""
        expired = self._ledger.expire(self._expire_after_s, CHUNK)
        purged = 0 if self._retain_s is None else self._ledger.purge(self._retain_s, CHUNK)
        return max(expired, purged) == CHUNK

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                self.step()
                # Part by part between two steps, so that nobody waits long for the store.
                if time.monotonic() >= due and not self.tidy():
                    due = time.monotonic() + _TIDY_S
            except Exception:
                # The store is away, or one row is not what it should be: the next step tries
                # again, and a thread that dies would stop calibration without a word.
                log.exception("joining labels failed; the next step tries again")
            self._stop.wait(self._interval_s)


def move_counters(rows: Sequence[Joined]) -> None:
    """Add joined rows to the counters, under the version that predicted each of them."""
    for (model, version), totals in totals_of(rows).items():
        instruments.add_totals(model, version, totals)
    for model, n in Counter(r.model for r in rows).items():
        instruments.count_feedback(model, "joined", n)
        delays: F64 = np.array([r.received - r.predicted for r in rows if r.model == model])
        # A label that came before its prediction did not wait at all.
        instruments.observe_feedback_delay(model, np.maximum(delays, 0.0))
