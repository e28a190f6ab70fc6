"""The ledger: predictions that wait for their labels, in SQLite or PostgreSQL.

A prediction never waits for it and never fails because of it: ``record`` fills a bounded queue,
one thread writes, and while the store is away entries go to a local spool. What fits nowhere is
dropped and counted. It keeps what calibration needs and no features.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from posthoc.contract import Array, HedgedError, Task
from service import instruments, store
from service.labels import Joined, LabelItem, Totals, merge_totals, totals_of
from service.rows import KEPT, Row, Served, Source, from_json, rows_of, to_json
from service.schema import (
    LedgerError,
    create_tables,
    is_away,
    ledger_key,
    ledger_url,
    make_engine,
)
from service.spool import Entry, Spool
from service.summary import summary_of

log = logging.getLogger(__name__)

__all__ = ["LabelItem", "Ledger", "LedgerError"]

_LINGER_S = 0.02  # one wake-up of the writer serves many small requests
_WRITE_ROWS = 1000  # rows per transaction
_RETRY_S = 1.0  # between looks at a store that is away
_OPEN_S = 30.0  # how long processes that open one file together may stand in each other's way


class Ledger:
    """One ledger, as one process sees it. Thread-safe."""

    def __init__(self, engine: sa.Engine, spool: Spool, *, max_queue_rows: int) -> None:
        self._engine = engine
        self._spool = spool
        self._max_queue_rows = max_queue_rows
        self._created = False
        # SQLite has one writer: threads of this process queue here and not in busy-waits.
        self._writing = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()
        self._keys: dict[Source, int] = {}
        self._changed = threading.Condition()
        self._queue: deque[Served | Source] = deque()
        self._rows = 0
        self._busy = False
        self._hurry = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hedged-ledger", daemon=True)

    @classmethod
    def open(
        cls,
        url_or_path: str | Path,
        *,
        max_queue_rows: int = 100_000,
        spool_dir: str | Path | None = None,
    ) -> Ledger:
        """Open or make the ledger at a file path or a ``postgresql://`` URL.

        ``max_queue_rows`` bounds the predictions in memory; ``spool_dir`` is where entries wait
        while the store is away (default: ``PATH.spool`` beside a SQLite file, else
        ``$XDG_STATE_HOME/hedged/spool``). A PostgreSQL server that does not answer yet is no
        error. Raises LedgerError for a file that cannot be opened or an unusable URL.
        """
        url = ledger_url(url_or_path)
        file = url.database if url.get_backend_name() == "sqlite" else None
        if spool_dir is None:
            state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
            spool_dir = f"{file}.spool" if file else Path(state) / "hedged/spool"
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        ledger = cls(
            make_engine(url),
            Spool(Path(spool_dir), ledger_key(url)),
            max_queue_rows=max_queue_rows,
        )
        ledger._first_contact(must=file is not None)
        ledger._spool.adopt()
        ledger._thread.start()
        return ledger

    def register(
        self,
        model: str,
        version: str,
        identity: str,
        *,
        task: Task,
        width: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Tell the ledger of a bundle before its first prediction; returns at once.

        With ``classes``, labels may be class names; ``width`` is the number of classes or outputs.
        """
        names = None if classes is None else tuple(classes)
        source = Source(model, version, identity, task, len(names) if names else width, names)
        with self._changed:
            self._queue.append(source)
            self._changed.notify_all()

    def record(
        self,
        model: str,
        version: str,
        identity: str,
        ids: Sequence[str],
        fields: Mapping[str, Array],
        level: str | None,
        group: Array | None = None,
    ) -> bool:
        """Keep N predictions; returns at once, False when the queue is full and they are dropped.

        ``fields`` are those of design section 5.3 for N rows; ``level`` is the level name of the
        sets or intervals; ``group`` N int64. A repeated id keeps the first prediction. The arrays
        are not copied, so do not write to them afterwards.
        """
        kept = {k: v for k, v in fields.items() if k in KEPT and v is not None}
        served = Served(model, version, identity, ids, kept, level, group, time.time())
        with self._changed:
            if self._closing or self._rows + len(ids) > self._max_queue_rows:
                instruments.LEDGER_DROPPED.inc(len(ids))
                return False
            self._queue.append(served)
            self._rows += len(ids)
            if len(self._queue) == 1 or self._rows >= _WRITE_ROWS:
                self._changed.notify_all()
            return True

    def add_labels(self, items: Sequence[LabelItem]) -> list[str]:
        """Keep labels; one result for each.

        ``accepted``: its prediction is known. ``pending``: no such prediction yet; it waits and
        expires. ``duplicate``: the same label is there. ``conflict``: another label is there and
        stays. ``invalid``: the id, the model or the label cannot be right. ``spooled``: the store
        is away, and it will be judged later. Raises LedgerError when nothing can take them.
        """
        results: list[str] = []
        for start in range(0, len(items), store.CHUNK):
            results += self._add_chunk(items[start : start + store.CHUNK])
        return results

    def claim(self, limit: int) -> list[Joined]:
        """Mark up to ``limit`` pending labels as joined, committed when this returns.

        No two callers, in whatever process, ever get the same label. Empty when nothing is due.
        """
        with self._transaction(read=True) as conn:
            if not store.anything_due(conn, time.time()):
                return []
        while True:
            with self._transaction() as conn:
                rows, unfit, seen = store.claim(conn, limit, time.time())
            for model, n in Counter(unfit).items():
                instruments.count_feedback(model, "invalid", n)
            if rows or not seen:
                return rows

    def calibration(self, model: str | None = None, since: float | None = None) -> dict[str, Any]:
        """Calibration computed from the ledger itself: exact, whatever the counters went through.

        ``since`` (seconds since the epoch) leaves older predictions out. See ``service.summary``
        for the keys. Raises LedgerError while the store is away.
        """
        totals: dict[tuple[str, str], Totals] = {}
        try:
            with self._transaction(read=True) as conn:
                served = store.served_counts(conn, model, since)
                for page in store.joined_pages(conn, model, since):
                    for key, part in totals_of(page).items():
                        totals[key] = merge_totals(totals[key], part) if key in totals else part
                feedback = store.feedback_counts(conn, model)
        except SQLAlchemyError as e:
            raise LedgerError(f"the ledger's store cannot be read ({_short(e)}); try again") from e
        return summary_of(served, totals, feedback, since)

    def forget(self, id: str, model: str | None = None) -> int:
        """Erase a prediction and its label; the number of predictions erased.

        Raises LedgerError while the store is away. A prediction that another process has not
        written yet is not found.
        """
        self.flush()
        if self._spool.pending:
            raise LedgerError("the ledger's store is away, nothing can be erased; try again later")
        try:
            with self._transaction() as conn:
                return store.forget(conn, id, model)
        except SQLAlchemyError as e:
            raise LedgerError(f"the prediction could not be erased ({_short(e)}); try again") from e

    def expire(self, older_than_seconds: float) -> int:
        """Remove labels that waited longer for a prediction that never came; how many."""
        with self._transaction() as conn:
            models = store.expire(conn, time.time() - older_than_seconds)
        for model, n in Counter(models).items():
            instruments.count_feedback(model, "expired", n)
        return len(models)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything recorded so far is written or spooled; False on timeout."""
        with self._changed:
            self._hurry += 1
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._queue and not self._busy, timeout_s)
            self._hurry -= 1
            return done

    @property
    def spooling(self) -> bool:
        """Whether entries wait on local disk for the store to come back."""
        return self._spool.pending

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is queued, end the thread, and let go of the store."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._spool.close()
        self._engine.dispose()

    # ------------------------------------------------------------------ the writer

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            try:
                if self._spool.pending:
                    self._replay()
                for entry in _entries(batch):
                    self._keep(entry)
            except Exception:
                # One wrong batch must not end the writing of all others.
                log.exception("a batch of predictions could not be written to the ledger")
                instruments.LEDGER_DROPPED.inc(_count(batch))
            with self._changed:
                self._busy = False
                instruments.LEDGER_QUEUE_ROWS.set(self._rows)
                self._changed.notify_all()

    def _take(self) -> list[Served | Source] | None:
        """The next batch, possibly empty when the spool wants a look; None when all is done."""
        with self._changed:
            retry = _RETRY_S if self._spool.pending else None
            self._changed.wait_for(lambda: self._queue or self._closing or self._hurry, retry)
            self._changed.wait_for(
                lambda: self._rows >= _WRITE_ROWS or self._closing or self._hurry, _LINGER_S
            )
            if not self._queue and self._closing:
                return None
            batch: list[Served | Source] = []
            rows = 0
            while self._queue and rows < _WRITE_ROWS:
                batch.append(self._queue.popleft())
                rows += _count(batch[-1:])
            self._rows -= rows
            self._busy = True
            instruments.LEDGER_QUEUE_ROWS.set(self._rows)
            return batch

    def _keep(self, entry: Entry) -> None:
        """Write an entry to the store, or to the spool while the store is away."""
        n = len(entry.get("rows", ()))
        if not self._spool.pending:
            try:
                self._apply(entry)
                return
            except SQLAlchemyError as e:
                instruments.LEDGER_WRITE_ERRORS.inc()
                if not is_away(e):
                    raise
                log.warning("the ledger's store is away, spooling: %s", _short(e))
        try:
            self._spool.append(_packed(entry))
            instruments.LEDGER_SPOOLED.inc(n)
        except OSError as e:
            log.error("predictions fit neither the ledger nor its spool: %s", e)
            instruments.LEDGER_DROPPED.inc(n)

    def _replay(self) -> None:
        try:
            self._spool.replay(self._apply_again)
            self._spool.adopt()
        except SQLAlchemyError as e:
            instruments.LEDGER_WRITE_ERRORS.inc()
            log.debug("the ledger's store is still away: %s", _short(e))

    def _apply_again(self, entry: Entry) -> None:
        try:
            self._apply(_unpacked(entry))
        except Exception as e:
            if isinstance(e, SQLAlchemyError) and is_away(e):
                raise
            # It would stand in the way of every entry after it for ever.
            log.exception("a spooled entry was refused by the ledger")
            instruments.LEDGER_DROPPED.inc(max(1, len(entry.get("rows", entry.get("items", ())))))

    def _apply(self, entry: Entry) -> None:
        """One entry in one transaction."""
        if "items" in entry:
            self._insert_labels([LabelItem(*item) for item in entry["items"]], entry["time"])
            return
        source: Source = entry["source"]
        with self._transaction() as conn:
            key = self._keys.get(source) or store.bundle_key(conn, source)
            if entry["rows"]:
                store.insert_predictions(conn, key, entry["rows"])
        self._keys[source] = key  # only now is it committed
        instruments.LEDGER_WRITTEN.inc(len(entry["rows"]))

    def _insert_labels(self, items: Sequence[LabelItem], now: float) -> list[str]:
        with self._transaction() as conn:
            results = store.insert_labels(conn, items, now)
        _count_results(items, results)
        return results

    def _add_chunk(self, items: Sequence[LabelItem]) -> list[str]:
        now = time.time()
        if not self._spool.pending:
            try:
                return self._insert_labels(items, now)
            except SQLAlchemyError as e:
                instruments.LEDGER_WRITE_ERRORS.inc()
                if not is_away(e):
                    raise LedgerError(f"the labels could not be stored ({_short(e)})") from e
                log.warning("the ledger's store is away, spooling labels: %s", _short(e))
        try:
            self._spool.append({"items": [[x.model, x.id, x.label] for x in items], "time": now})
        except OSError as e:
            raise LedgerError(f"labels fit neither the ledger nor its spool: {e}") from e
        instruments.LEDGER_SPOOLED.inc(len(items))
        results = ["spooled"] * len(items)
        _count_results(items, results)
        with self._changed:
            self._changed.notify_all()
        return results

    # ------------------------------------------------------------------ the store

    @contextmanager
    def _transaction(self, *, read: bool = False) -> Iterator[sa.Connection]:
        if not self._created:
            create_tables(self._engine)
            self._created = True
        engine = self._engine.execution_options(read=read)
        with nullcontext() if read else self._writing, engine.begin() as conn:
            yield conn

    def _first_contact(self, *, must: bool) -> None:
        deadline = time.monotonic() + _OPEN_S
        while True:
            try:
                with self._transaction(read=True):
                    return
            except SQLAlchemyError as e:
                # Turning a new file to WAL does not wait for other openers as a BEGIN does.
                if must and "locked" in str(e) and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                if must:
                    raise LedgerError(
                        f"the ledger {self._engine.url.database} cannot be opened ({_short(e)})"
                    ) from e
                log.warning("the ledger's store does not answer yet: %s", _short(e))
                return


def _count(batch: Sequence[Served | Source]) -> int:
    return sum(len(b.ids) for b in batch if isinstance(b, Served))


def _count_results(items: Sequence[LabelItem], results: Sequence[str]) -> None:
    pairs = Counter((item.model or "", r) for item, r in zip(items, results, strict=True))
    for (model, result), n in pairs.items():
        instruments.count_feedback(model, result, n)


def _entries(batch: Sequence[Served | Source]) -> Iterator[Entry]:
    """Entries of a batch in its order, predictions of one bundle together."""
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
        for source, rows in rows_of(batches):
            yield {"source": source, "rows": rows}
    except (HedgedError, KeyError, ValueError, TypeError):
        if len(batches) < 2:
            raise
        for one in batches:  # only the wrong ones are lost
            yield from _prediction_entries([one])


def _packed(entry: Entry) -> Entry:
    rows: list[Row] = entry["rows"]
    return {"source": asdict(entry["source"]), "rows": to_json(rows)}


def _unpacked(entry: Entry) -> Entry:
    if "items" in entry:
        return entry
    source = dict(entry["source"])
    source["classes"] = None if source["classes"] is None else tuple(source["classes"])
    return {"source": Source(**source), "rows": from_json(entry["rows"])}


def _short(error: Exception) -> str:
    return str(error).splitlines()[0]
