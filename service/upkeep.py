"""A ledger from beside its service: what is in it, what leaves it, and labels in bulk.

There is no queue and no spool here: whoever asks waits, and is told what failed. A service may go
on writing to the same ledger: nothing here keeps its store for longer than one short transaction,
and a pause follows each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service import migrations, removal, store
from service.labels import LabelItem
from service.rows import Source
from service.schema import (
    LedgerError,
    bundles,
    feedback,
    images,
    labels,
    ledger_url,
    make_engine,
    predictions,
    reading,
    relaxed,
    short,
)

_PAUSE = 0.2  # of the time that a transaction took: another writer gets in between
_TABLES = (bundles, predictions, images, labels, feedback)


class BusyLedgerError(LedgerError):
    """The store did not answer or was busy for long; what was done so far stays done."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on


def file_of(url_or_path: str | Path) -> Path | None:
    """The file of a SQLite ledger, None for a server's. Raises LedgerError where it is not there,
    or for what `ledger_url` refuses."""
    url = ledger_url(url_or_path)
    file = Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
    if file is not None and not file.is_file():
        raise LedgerError(f"{file}: no such ledger")
    return file


@contextmanager
def opened(url_or_path: str | Path) -> Iterator[Upkeep]:
    """The ledger at a path or URL, brought to the revision of today; it must be there.

    Raises LedgerError for one that is not, that is newer, or that cannot be opened;
    BusyLedgerError, inside too, when its store fails.
    """
    file = file_of(url_or_path)
    url = ledger_url(url_or_path)
    engine = make_engine(url)
    try:
        if file is None:
            _must_hold_tables(engine)
        migrations.upgrade(engine)
        yield Upkeep(engine, file)
    except SQLAlchemyError as e:
        raise BusyLedgerError(
            f"the ledger {url.database} cannot be used ({short(e)}); run the same command again"
        ) from e
    finally:
        engine.dispose()


class Upkeep:
    """One open ledger; see `opened`. ``file`` is its SQLite file."""

    def __init__(self, engine: sa.Engine, file: Path | None) -> None:
        self._engine = engine
        self._file = file

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection in a transaction that only reads."""
        with reading(self._engine).begin() as conn:
            yield conn

    def sources(self) -> list[Source]:
        """The bundles that the ledger has met, oldest first."""
        with self.reading() as conn:
            return list(store.sources(conn).values())

    def info(self) -> dict[str, Any]:
        """What the ledger holds, as plain values.

        ``predictions``, ``images`` and ``labels`` (joined and pending) are rows, ``oldest`` and
        ``newest`` are of the predictions in seconds since the epoch (None for none), ``bytes`` is
        what it takes on disk, and ``models`` has the rows of each model and version.
        """
        with reading(self._engine).begin() as conn:
            state = sa.select(labels.c.joined.is_(None), sa.func.count())
            found = {bool(k): n for k, n in conn.execute(state.group_by(labels.c.joined.is_(None)))}
            models = [
                {"model": s.model, "version": s.version, "task": s.task, **_of_bundle(conn, key)}
                for key, s in store.sources(conn).items()
            ]
            size = _bytes(conn, self._file)
            revision = migrations.current(conn)
        times = [m[k] for m in models for k in ("oldest", "newest") if m[k] is not None]
        return {
            "revision": revision,
            "bytes": size,
            "predictions": sum(m["predictions"] for m in models),
            "images": sum(m["images"] for m in models),
            "labels": sum(found.values()),
            "joined": found.get(False, 0),
            "pending": found.get(True, 0),
            "oldest": min(times, default=None),
            "newest": max(times, default=None),
            "models": models,
        }

    def purge(self, older_than_s: float, tell: Callable[[int], None]) -> tuple[int, int]:
        """Remove predictions older than so many seconds, with their labels, and labels that have
        waited as long for a prediction; how many of each.

        ``tell`` hears how many rows are gone after each part. A prediction whose label waits for
        a joiner stays.
        """
        before = time.time() - older_than_s
        gone = waited = 0
        while True:
            with self._short(relaxed(self._engine)) as conn:
                part = removal.purge(conn, before, store.CHUNK)
                old = len(removal.expire(conn, before, store.CHUNK))
            gone, waited = gone + part, waited + old
            tell(gone + waited)
            if max(part, old) < store.CHUNK:
                return gone, waited

    def forget(self, ids: Sequence[str], model: str | None = None) -> dict[str, int]:
        """Erase predictions and their labels by id; how many predictions each id had."""
        found = {}
        for id in ids:
            with self._short(self._engine) as conn:
                found[id] = removal.forget(conn, id, model)
        return found

    def add_labels(self, items: Sequence[LabelItem]) -> list[str]:
        """One result for each of at most `store.CHUNK` labels, as `Ledger.add_labels` has them.

        They are on disk when this returns, and wait for a service's joiner to count them.
        """
        with self._short(self._engine) as conn:
            return store.insert_labels(conn, items, time.time())

    @contextmanager
    def _short(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        with engine.begin() as conn:
            start = time.monotonic()
            yield conn
        time.sleep(_PAUSE * (time.monotonic() - start))


def _must_hold_tables(engine: sa.Engine) -> None:
    with reading(engine).begin() as conn:
        if not sa.inspect(conn).has_table(predictions.name):
            raise LedgerError(f"the database {engine.url.database} holds no ledger")


def _of_bundle(conn: sa.Connection, bundle: int) -> dict[str, Any]:
    found: dict[str, Any] = {"oldest": None, "newest": None}
    times: list[float] = []
    for table in (predictions, images):
        stmt = sa.select(sa.func.count(), sa.func.min(table.c.time), sa.func.max(table.c.time))
        n, first, last = conn.execute(stmt.where(table.c.bundle == bundle)).one()
        found[table.name] = n
        times += [t for t in (first, last) if t is not None]
    if times:
        found |= {"oldest": min(times), "newest": max(times)}
    return found


def _bytes(conn: sa.Connection, file: Path | None) -> int:
    if file is not None:
        beside = (file, file.with_name(file.name + "-wal"))
        return sum(path.stat().st_size for path in beside if path.exists())
    sizes = (sa.func.pg_total_relation_size(table.name) for table in _TABLES)
    return sum(conn.execute(sa.select(*sizes)).one())
