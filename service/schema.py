"""The tables of the ledger, and the engine that reaches them: SQLite or PostgreSQL, one schema."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError as SqlDataError
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from posthoc.contract import HedgedError
from service import postgres
from service.libpq import ParameterError, parameters

BUSY_TIMEOUT_MS = 5000
_ROWS_AT_FAULT = ("22", "23")  # SQLSTATE classes: what a row holds, and what a table forbids
LEDGER_LOCK = 0x68656467  # "hedg": PostgreSQL's advisory lock of whoever makes or changes tables


class LedgerError(HedgedError):
    """A ledger that cannot be opened, or that can take nothing at the moment."""


class RevisionError(LedgerError):
    """A ledger that is newer than this code, or tables that are not a ledger's."""


metadata = sa.MetaData()
_BIG_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite: an alias of the rowid
_F64: sa.types.TypeEngine[float] = sa.Double()

bundles = sa.Table(
    "bundles",
    metadata,
    sa.Column("bundle", sa.Integer, primary_key=True),
    sa.Column("identity", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("width", sa.Integer),  # classes or outputs
    sa.Column("classes", sa.Text),  # JSON list of names
    sa.Column("levels", sa.Text),  # JSON list of level names such as "0.9"
    sa.UniqueConstraint("model", "version", "identity"),
)

# Blobs are little-endian float32 in row-major order, but for ``set``: numpy.packbits of C bools.
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("seq", _BIG_KEY, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("bundle", sa.Integer, nullable=False),
    sa.Column("time", _F64, nullable=False),  # seconds since the epoch, UTC
    sa.Column("grp", sa.BigInteger),
    sa.Column("level", sa.Text),  # of the set or interval, such as "0.9"
    sa.Column("label", sa.Integer),
    sa.Column("confidence", _F64),
    sa.Column("bin", sa.SmallInteger),  # calibration.metrics.totals.bin_index
    sa.Column("entropy", _F64),
    sa.Column("probs", sa.LargeBinary),
    sa.Column("set", sa.LargeBinary),
    sa.Column("set_size", sa.Integer),
    sa.Column("mean", sa.LargeBinary),
    sa.Column("std", sa.LargeBinary),
    sa.Column("lower", sa.LargeBinary),
    sa.Column("upper", sa.LargeBinary),
    sa.Column("quantiles", sa.LargeBinary),
    sa.Column("ood_pvalue", _F64),
    sa.Column("ood", sa.Boolean),
    sa.Column("abstain", sa.Boolean),
    sa.Index("predictions_id", "model", "id", unique=True),
    # Everything that counting what was served needs, so that the wide rows stay unread.
    sa.Index("predictions_served", "bundle", "time", "bin", "confidence"),
)

# Of a dense prediction a summary (service.images) and no pixel, so that no label can be joined.
images = sa.Table(
    "images",
    metadata,
    sa.Column("seq", _BIG_KEY, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("bundle", sa.Integer, nullable=False),
    sa.Column("time", _F64, nullable=False),  # seconds since the epoch, UTC
    sa.Column("level", sa.Text),
    sa.Column("confidence", _F64),  # mean over pixels, and so are entropy, set_size and std
    sa.Column("entropy", _F64),
    sa.Column("set_size", _F64),
    sa.Column("std", _F64),
    sa.Column("ood", _F64),  # share of pixels, and so is abstain
    sa.Column("abstain", _F64),
    sa.Column("ood_pvalue", _F64),  # of one pixel, drawn by a hash of the id
    sa.Index("images_id", "model", "id", unique=True),
    sa.Index("images_served", "bundle", "time"),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("seq", _BIG_KEY, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("value", sa.Text, nullable=False),  # JSON: class index, or list of K floats
    sa.Column("received", _F64, nullable=False),
    sa.Column("joined", _F64),  # null while pending
    sa.Column("next_try", _F64, nullable=False),  # when a joiner looks for its prediction again
    sa.Index("labels_id", "model", "id", unique=True),
)
sa.Index(
    "labels_pending",
    labels.c.next_try,
    sqlite_where=labels.c.joined.is_(None),
    postgresql_where=labels.c.joined.is_(None),
)

# What was joined, in order of time: what a monitor has not read yet.
sa.Index(
    "labels_joined",
    labels.c.joined,
    labels.c.seq,
    sqlite_where=labels.c.joined.is_not(None),
    postgresql_where=labels.c.joined.is_not(None),
)

feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("result", sa.Text, primary_key=True),
    sa.Column("n", sa.BigInteger, nullable=False),
)


def insert(conn: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ON CONFLICT in the dialect of ``conn``."""
    if conn.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def ledger_url(url_or_path: str | Path) -> sa.URL:
    """The SQLAlchemy URL of a file path or of a ``postgresql://`` or ``sqlite:///`` URL.

    Raises LedgerError for another database, text that is no URL, and a connection to PostgreSQL
    that is not described as `service.libpq` reads it.
    """
    text = str(url_or_path)
    if "://" not in text:
        return sa.URL.create("sqlite", database=str(Path(text).absolute()))
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError) as e:
        raise LedgerError(
            f"the ledger URL cannot be read ({e}); use a path or postgresql://"
        ) from e
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return sa.URL.create("sqlite", database=str(Path(url.database).absolute()))
    if backend in {"postgresql", "postgres"}:
        url = url.set(drivername="postgresql+pg8000")
        try:
            parameters(url, os.environ)
        except ParameterError as e:
            raise LedgerError(f"the ledger cannot be reached: {e}") from e
        return url
    raise LedgerError(f"the ledger is a SQLite file or postgresql://…, not {backend}://…")


def ledger_key(url: sa.URL) -> str:
    """Sixteen hex digits that tell one ledger from another; the user and password do not enter."""
    where = (url.get_backend_name(), url.host, url.port, url.database, sorted(url.query.items()))
    return hashlib.sha256(repr(where).encode()).hexdigest()[:16]


def make_engine(url: sa.URL) -> sa.Engine:
    """An engine whose transactions are serialisable writers on SQLite.

    SQLite: WAL, ``synchronous=FULL`` unless the execution option ``relaxed`` is set, BEGIN
    IMMEDIATE unless the execution option ``read`` is set, since a transaction that reads first
    and writes later fails at once when another writer came in between. Raises LedgerError when
    the PostgreSQL driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
        return engine
    try:
        return sa.create_engine(
            url, pool_pre_ping=True, creator=lambda: postgres.connect(url, os.environ)
        )
    except ModuleNotFoundError as e:
        raise LedgerError("a PostgreSQL ledger needs pg8000; pip install 'hedged[postgres]'") from e


def reading(engine: sa.Engine) -> sa.Engine:
    """The same engine for transactions that only read, each from one snapshot."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(read=True)
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def relaxed(engine: sa.Engine) -> sa.Engine:
    """The same engine for what a power failure may take: SQLite commits without an fsync."""
    return engine.execution_options(relaxed=True)


def is_away(error: Exception) -> bool:
    """Whether a failure lies with the store, so that the same rows may succeed later."""
    if isinstance(error, IntegrityError | SqlDataError):
        return False
    if isinstance(error, DBAPIError):
        # pg8000 has one class for all that the server refuses.
        return (postgres.error_code(error.orig) or "")[:2] not in _ROWS_AT_FAULT
    return isinstance(error, PoolTimeoutError | RevisionError)


def short(error: Exception) -> str:
    """What an error says, without the statement and its values that follow."""
    told = postgres.error_text(error.orig) if isinstance(error, DBAPIError) else None
    return (told or str(error)).splitlines()[0]


def _sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode=WAL")


def _sqlite_begin(conn: sa.Connection) -> None:
    options = conn.get_execution_options()
    read = options.get("read", False)
    # Per transaction, since connections are shared; it cannot be changed after BEGIN.
    conn.exec_driver_sql(f"PRAGMA synchronous={'NORMAL' if options.get('relaxed') else 'FULL'}")
    conn.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")
