"""Many rows in one statement, without SQLAlchemy, which takes as long as SQLite to look at every
value.

SQLite runs a prepared statement for each row. PostgreSQL, where each would be a message there and
back, gets all rows as one JSON document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

Rows = Sequence[tuple[Any, ...]]


def insert_many(conn: sa.Connection, table: sa.Table, names: tuple[str, ...], rows: Rows) -> None:
    """Insert rows of the columns ``names``; one that is there already stays as it is."""
    if not rows:
        return
    if conn.dialect.name == "sqlite":
        conn.exec_driver_sql(_insert_each(conn.dialect, table, names), rows)
    else:
        text = _insert_all(conn.dialect, table, names)
        conn.exec_driver_sql(text, (_document(names, rows),))


def update_many(
    conn: sa.Connection,
    table: sa.Table,
    key: str,
    names: tuple[str, ...],
    rows: Rows,
) -> None:
    """Set the columns ``names`` where the column ``key`` is the last value of a row."""
    if not rows:
        return
    if conn.dialect.name == "sqlite":
        conn.exec_driver_sql(_update_each(conn.dialect, table, key, names), rows)
    else:
        text = _update_all(conn.dialect, table, key, names)
        conn.exec_driver_sql(text, (_document((*names, key), rows),))


@cache
def _insert_each(dialect: sa.Dialect, table: sa.Table, names: tuple[str, ...]) -> str:
    marks = ", ".join("?" * len(names))
    columns = ", ".join(_quoted(dialect, names))
    return f"INSERT INTO {table.name} ({columns}) VALUES ({marks}) ON CONFLICT DO NOTHING"


@cache
def _update_each(dialect: sa.Dialect, table: sa.Table, key: str, names: tuple[str, ...]) -> str:
    changes = ", ".join(f"{n} = ?" for n in _quoted(dialect, names))
    return f"UPDATE {table.name} SET {changes} WHERE {key} = ?"


@cache
def _insert_all(dialect: sa.Dialect, table: sa.Table, names: tuple[str, ...]) -> str:
    columns = ", ".join(_quoted(dialect, names))
    source = _recordset(dialect, table, names)
    return f"INSERT INTO {table.name} ({columns}) SELECT * FROM {source} ON CONFLICT DO NOTHING"


@cache
def _update_all(dialect: sa.Dialect, table: sa.Table, key: str, names: tuple[str, ...]) -> str:
    changes = ", ".join(f"{n} = new.{n}" for n in _quoted(dialect, names))
    source = _recordset(dialect, table, (*names, key))
    return f"UPDATE {table.name} SET {changes} FROM {source} WHERE {table.name}.{key} = new.{key}"


def _recordset(dialect: sa.Dialect, table: sa.Table, names: Sequence[str]) -> str:
    """The rows of a `_document` as a table called new, in its order."""
    types = (table.c[n].type.compile(dialect) for n in names)
    columns = ", ".join(map(" ".join, zip(_quoted(dialect, names), types, strict=True)))
    return f"json_to_recordset(%s) AS new({columns})"


def _quoted(dialect: sa.Dialect, names: Iterable[str]) -> list[str]:
    return [dialect.identifier_preparer.quote(n) for n in names]


def _document(names: Sequence[str], rows: Rows) -> str:
    records = [dict(zip(names, row, strict=True)) for row in rows]
    try:
        return json.dumps(records, default=_bytea, allow_nan=False)
    except ValueError:  # a number that JSON has not, and PostgreSQL reads as text
        finite = [{k: _number(v) for k, v in record.items()} for record in records]
        return json.dumps(finite, default=_bytea)


def _bytea(value: bytes) -> str:
    return "\\x" + value.hex()


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
