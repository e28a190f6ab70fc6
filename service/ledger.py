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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from posthoc.contract import Array, Task
from service import account, instruments, metrics, migrations, removal, store
from service.labels import Joined, LabelItem
from service.rows import Served, Source, compact
from service.schema import (
    LedgerError,
    is_away,
    ledger_key,
    ledger_url,
    make_engine,
    reading,
    relaxed,
    short,
)
from service.spool import Entry, Spool
from service.writer import Writer

log = logging.getLogger(__name__)

__all__ = ["LabelItem", "Ledger", "LedgerError"]

_SAME_TIME_S = 1.0  # labels spooled within it count as of one time
_OPEN_S = 30.0  # how long processes that open one file together may stand in each other's way


class Ledger:
    """One ledger, as one process sees it. Thread-safe."""

    def __init__(
        self, engine: sa.Engine, spool: Spool, *, max_queue_rows: int, max_queue_bytes: int
    ) -> None:
        self._engine = engine
        self._reader = reading(engine)
        self._relaxed = relaxed(engine)
        self._spool = spool
        self._writer = Writer(self._apply, spool, max_queue_rows, max_queue_bytes)
        self._current = False  # whether its tables are known to be those of today
        # SQLite has one writer: threads of this process queue here and not in busy-waits.
        self._writing = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()
        self._keys: dict[Source, int] = {}

    @classmethod
    def open(
        cls,
        url_or_path: str | Path,
        *,
        max_queue_rows: int = 100_000,
        max_queue_bytes: int = 256 << 20,
        spool_dir: str | Path | None = None,
    ) -> Ledger:
        """Open or make the ledger at a file path or a ``postgresql://`` URL.

        ``max_queue_rows`` and ``max_queue_bytes`` bound the predictions in memory; ``spool_dir``
        is where entries wait while the store is away (default: ``PATH.spool`` beside a SQLite
        file, else ``$XDG_STATE_HOME/hedged/spool``). A PostgreSQL server that does not answer yet
        is no error. Raises LedgerError for a file that cannot be opened or an unusable URL.
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
            max_queue_bytes=max_queue_bytes,
        )
        try:
            ledger._first_contact(must=file is not None)
        except LedgerError:
            ledger._engine.dispose()
            raise
        ledger._spool.adopt()
        ledger._writer.start()
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
        levels: Sequence[str] | None = None,
    ) -> None:
        """Tell the ledger of a bundle before its first prediction.

        With ``classes``, labels may be class names; ``width`` is the number of classes or outputs;
        ``levels`` are the bundle's own level names. While the store is away this is spooled like
        everything else.
        """
        names = None if classes is None else tuple(classes)
        source = Source(
            model,
            version,
            identity,
            task,
            len(names) if names else width,
            names,
            None if levels is None else tuple(levels),
        )
        try:
            self._apply([{"source": source, "rows": []}])
        except SQLAlchemyError as e:
            if not is_away(e):
                raise LedgerError(f"{model} {version} could not be registered ({short(e)})") from e
            self._writer.put(source)

    def sources(self, within_s: float) -> list[Source]:
        """The bundles that predicted within so many seconds, whoever served them, oldest first.

        Raises LedgerError while the store is away.
        """
        try:
            with self._transaction(read=True) as conn:
                return store.sources_since(conn, time.time() - within_s)
        except SQLAlchemyError as e:
            raise LedgerError(f"the ledger's store cannot be read ({short(e)}); try again") from e

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
        sets or intervals; ``group`` N int64. A repeated id keeps the first prediction. Arrays
        that own their data are not copied, so do not write to them afterwards.
        """
        try:
            kept, width = compact(fields)
        except (TypeError, ValueError):
            log.exception("a batch of %s is no prediction", model)
            metrics.LEDGER_DROPPED.inc(len(ids))
            return False
        return self._queue(
            Served(model, version, identity, ids, kept, width, level, group, time.time())
        )

    def record_images(
        self,
        model: str,
        version: str,
        identity: str,
        ids: Sequence[str],
        summary: Mapping[str, Array],
        level: str | None,
    ) -> bool:
        """Keep the `service.images.summary` of N images; as ``record`` otherwise.

        A label for one of them is ``invalid``: there is no map to join it with.
        """
        return self._queue(
            Served(
                model, version, identity, ids, summary, None, level, None, time.time(), images=True
            )
        )

    def _queue(self, served: Served) -> bool:
        if self._writer.put(served):
            return True
        metrics.LEDGER_DROPPED.inc(len(served.ids))
        return False

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
        try:
            with self._transaction(read=True) as conn:
                return account.calibration(conn, model, since)
        except SQLAlchemyError as e:
            raise LedgerError(f"the ledger's store cannot be read ({short(e)}); try again") from e

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
                return removal.forget(conn, id, model)
        except SQLAlchemyError as e:
            raise LedgerError(f"the prediction could not be erased ({short(e)}); try again") from e

    def expire(self, older_than_seconds: float, limit: int = store.CHUNK) -> int:
        """Remove up to ``limit`` labels that waited longer for a prediction that never came.

        Returns how many; fewer than ``limit`` were all.
        """
        with self._transaction() as conn:
            models = removal.expire(conn, time.time() - older_than_seconds, limit)
        for model, n in Counter(models).items():
            instruments.count_feedback(model, "expired", n)
        return len(models)

    def purge(self, older_than_seconds: float, limit: int = store.CHUNK) -> int:
        """Remove up to ``limit`` predictions that are older, with their labels.

        Returns how many; fewer than ``limit`` were all. A prediction stays while its label waits
        for a joiner.
        """
        # What a power failure brings back is removed again.
        with self._transaction(durable=False) as conn:
            return removal.purge(conn, time.time() - older_than_seconds, limit)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything recorded so far is written or spooled; False on timeout."""
        return self._writer.flush(timeout_s)

    @property
    def spooling(self) -> bool:
        """Whether entries wait on local disk for the store to come back."""
        return self._spool.pending

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is queued, end the thread, and let go of the store."""
        self._writer.close(timeout_s)
        self._spool.close()
        self._engine.dispose()

    def _apply(self, entries: Sequence[Entry]) -> None:
        """Entries in one transaction: predictions first, so that their labels find them."""
        served = [entry for entry in entries if "items" not in entry]
        sent = _labels_together(entry for entry in entries if "items" in entry)
        keys: dict[Source, int] = {}
        results = []
        # A label or a bundle must survive a power failure; the last predictions need not.
        with self._transaction(durable=bool(sent) or not all(e["rows"] for e in served)) as conn:
            for entry in served:
                source: Source = entry["source"]
                key = self._keys.get(source) or keys.get(source)
                keys[source] = key = key or store.bundle_key(conn, source)
                if entry["rows"]:
                    store.insert_predictions(conn, key, entry["rows"], of_images=source.images)
            results = [store.insert_labels(conn, items, received) for items, received in sent]
        self._keys |= keys  # only now are they committed
        metrics.LEDGER_WRITTEN.inc(sum(len(entry["rows"]) for entry in served))
        for (items, _), result in zip(sent, results, strict=True):
            _count_results(items, result)

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
                metrics.LEDGER_WRITE_ERRORS.inc()
                if not is_away(e):
                    raise LedgerError(f"the labels could not be stored ({short(e)})") from e
                log.warning("the ledger's store is away, spooling labels: %s", short(e))
        results = ["spooled"] * len(items)
        kept = []
        for i, x in enumerate(items):
            try:
                kept.append([x.model, x.id, store.plain_label(x.label)])
            except (TypeError, ValueError):
                results[i] = "invalid"
        try:
            self._spool.append({"items": kept, "time": now})
        except OSError as e:
            raise LedgerError(f"labels fit neither the ledger nor its spool: {e}") from e
        metrics.LEDGER_SPOOLED.inc(len(kept))
        _count_results(items, results)
        self._writer.wake()
        return results

    @contextmanager
    def _transaction(self, *, read: bool = False, durable: bool = True) -> Iterator[sa.Connection]:
        if not self._current:
            migrations.upgrade(self._engine)
            self._current = True
        lock = nullcontext() if read else self._writing
        engine = self._reader if read else self._engine if durable else self._relaxed
        with lock, engine.begin() as conn:
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
                        f"the ledger {self._engine.url.database} cannot be opened ({short(e)})"
                    ) from e
                log.warning("the ledger's store does not answer yet: %s", short(e))
                return


def _labels_together(entries: Iterable[Entry]) -> list[tuple[list[LabelItem], float]]:
    """Labels and when they came; those of about the same time in one list of at most CHUNK."""
    out: list[tuple[list[LabelItem], float]] = []
    for entry in entries:
        items = [LabelItem(*item) for item in entry["items"]]
        room = bool(out) and len(out[-1][0]) + len(items) <= store.CHUNK
        if room and 0 <= entry["time"] - out[-1][1] < _SAME_TIME_S:
            out[-1][0].extend(items)
        else:
            out.append((items, entry["time"]))
    return out


def _count_results(items: Sequence[LabelItem], results: Sequence[str]) -> None:
    pairs = Counter((item.model or "", r) for item, r in zip(items, results, strict=True))
    for (model, result), n in pairs.items():
        instruments.count_feedback(model, result, n)
