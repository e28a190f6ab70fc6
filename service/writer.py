"""One thread that writes what is queued: to the store, or to a spool while the store is away."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from sqlalchemy.exc import SQLAlchemyError

from posthoc.contract import HedgedError
from service import metrics
from service.rows import Served, Source, from_json, rows_of, to_json
from service.schema import RevisionError, is_away, short
from service.spool import Entry, Spool

log = logging.getLogger(__name__)

# One wake-up serves many small requests, which the writer holds up while it works: with a fifth of
# this the slowest hundredth of them took a fifth longer.
_LINGER_S = 0.1
_WRITE_ROWS = 1000  # rows per transaction
_RETRY_S = 1.0  # between looks at a store that is away
_REPLAY_S = 0.5  # then what is queued is looked after: it must not fill up meanwhile

Item = Served | Source


class Writer:
    """A bounded queue in front of ``apply``, which writes entries in one transaction.

    An entry is ``{"source": Source, "rows": [...]}``; those found in the spool may also be
    ``{"items": [...], "time": t}``, which are labels.
    """

    def __init__(
        self, apply: Callable[[Sequence[Entry]], None], spool: Spool, max_rows: int, max_bytes: int
    ) -> None:
        self._apply = apply
        self._spool = spool
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._queue: deque[Item] = deque()
        self._rows = 0
        self._bytes = 0
        self._busy = False
        self._hurry = 0
        self._closing = False
        self._next_replay = 0.0
        self._thread = threading.Thread(target=self._run, name="hedged-ledger", daemon=True)

    def start(self) -> None:
        """Begin writing."""
        self._thread.start()

    def put(self, item: Item) -> bool:
        """Queue an item and return at once; False when the queue is full or closed."""
        n, size = _rows_in(item), _bytes_in(item)
        with self._changed:
            full = self._rows + n > self._max_rows or self._bytes + size > self._max_bytes
            if self._closing or full:
                return False
            self._queue.append(item)
            self._rows += n
            self._bytes += size
            if len(self._queue) == 1 or self._rows >= _WRITE_ROWS:
                self._changed.notify_all()
            return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued so far is written or spooled; False on timeout."""
        with self._changed:
            self._hurry += 1
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._queue and not self._busy, timeout_s)
            self._hurry -= 1
            return done

    def wake(self) -> None:
        """Let the writer see that the spool is no longer empty."""
        with self._changed:
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Write what is queued and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if self._spool.pending and time.monotonic() >= self._next_replay:
                self._replay()
            for entry in _entries(batch):
                self._keep(entry)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _take(self) -> list[Item] | None:
        """The next batch, empty when only the spool wants a look; None at the end."""
        with self._changed:
            while not (self._queue or self._closing or self._hurry):
                self._changed.wait(self._until_replay() if self._spool.pending else None)
                if self._spool.pending:
                    break
            self._changed.wait_for(
                lambda: self._rows >= _WRITE_ROWS or self._closing or self._hurry, _LINGER_S
            )
            if not self._queue and self._closing:
                return None
            batch: list[Item] = []
            rows = 0
            while self._queue and rows < _WRITE_ROWS:
                batch.append(self._queue.popleft())
                rows += _rows_in(batch[-1])
                self._bytes -= _bytes_in(batch[-1])
            self._rows -= rows
            self._busy = True
            metrics.LEDGER_QUEUE_ROWS.set(self._rows)
            return batch

    def _keep(self, entry: Entry) -> None:
        n = len(entry["rows"])
        if not self._spool.pending:
            try:
                self._apply([entry])
                return
            except Exception as e:  # a thread that dies would stop the writing of all others
                metrics.LEDGER_WRITE_ERRORS.inc()
                if not is_away(e):
                    log.exception("the ledger refused %d predictions", n)
                    metrics.LEDGER_DROPPED.inc(n)
                    return
                log.warning("the ledger's store is away, spooling: %s", short(e))
        try:
            self._spool.append({"source": asdict(entry["source"]), "rows": to_json(entry["rows"])})
            metrics.LEDGER_SPOOLED.inc(n)
        except OSError as e:
            log.error("predictions fit neither the ledger nor its spool: %s", e)
            metrics.LEDGER_DROPPED.inc(n)

    def _until_replay(self) -> float:
        return max(0.0, self._next_replay - time.monotonic())

    def _replay(self) -> None:
        try:
            self._spool.replay(self._apply_again, _REPLAY_S)
            self._spool.adopt()
        except (SQLAlchemyError, RevisionError) as e:
            metrics.LEDGER_WRITE_ERRORS.inc()
            log.debug("the ledger's store is still away: %s", short(e))
            self._next_replay = time.monotonic() + _RETRY_S

    def _apply_again(self, entries: Sequence[Entry]) -> None:
        try:
            self._apply([_unpacked(entry) for entry in entries])
        except Exception as e:
            if is_away(e):
                raise
            if len(entries) > 1:  # only the wrong one is lost
                for entry in entries:
                    self._apply_again([entry])
                return
            # It would stand in the way of every entry after it for ever.
            log.exception("a spooled entry was refused by the ledger")
            (entry,) = entries
            metrics.LEDGER_DROPPED.inc(len(entry.get("rows") or entry.get("items") or [entry]))


def _rows_in(item: Item) -> int:
    return len(item.ids) if isinstance(item, Served) else 0


def _bytes_in(item: Item) -> int:
    return item.size if isinstance(item, Served) else 0


def _entries(batch: Sequence[Item]) -> Iterator[Entry]:
    """Entries of a batch in its order, neighbouring predictions together."""
    waiting: list[Served] = []
    for item in batch:
        if isinstance(item, Served):
            waiting.append(item)
            continue
        yield from _prediction_entries(waiting)
        waiting = []
        yield {"source": item, "rows": []}
    yield from _prediction_entries(waiting)


def _prediction_entries(batches: Sequence[Served]) -> Iterator[Entry]:
    try:
        found = rows_of(batches)
    except (HedgedError, LookupError, TypeError, ValueError):
        if len(batches) > 1:  # only the wrong ones are lost
            for one in batches:
                yield from _prediction_entries([one])
            return
        log.exception("a batch of %s is no prediction", batches[0].model)
        metrics.LEDGER_DROPPED.inc(_rows_in(batches[0]))
        return
    for source, rows in found:
        yield {"source": source, "rows": rows}


def _unpacked(entry: Entry) -> Entry:
    if "items" in entry:
        return entry
    source = dict(entry["source"])
    for name in ("classes", "levels"):
        if (names := source.get(name)) is not None:
            source[name] = tuple(names)
    return {"source": Source(**source), "rows": from_json(entry["rows"])}
