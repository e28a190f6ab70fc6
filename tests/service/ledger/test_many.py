"""Many rows in one statement: what comes back is what SQLAlchemy itself would have written."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.many import insert_many, update_many
from service.schema import ledger_url, make_engine

TABLES = itertools.count()
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
KINDS: dict[str, tuple[sa.types.TypeEngine[Any], st.SearchStrategy[Any]]] = {
    "select": (sa.Text(), TEXTS),
    "a b": (sa.Double(), st.floats()),
    "n": (sa.BigInteger(), st.integers(-(2**63), 2**63 - 1)),
    "small": (sa.SmallInteger(), st.integers(-(2**15), 2**15 - 1)),
    "blob": (sa.LargeBinary(), st.binary()),
    "flag": (sa.Boolean(), st.booleans()),
}
VALUES = st.tuples(*(st.none() | values for _, values in KINDS.values()))
NAMES = tuple(KINDS)


@pytest.fixture
def engine(url, tmp_path):
    (tmp_path / "folder").mkdir()
    made = make_engine(ledger_url(url))
    yield made
    made.dispose()


def fresh(conn: sa.Connection) -> sa.Table:
    columns = (sa.Column(n, kind) for n, (kind, _) in KINDS.items())
    table = sa.Table(
        f"t{next(TABLES)}", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), *columns
    )
    table.create(conn)
    return table


def shown(row: tuple[Any, ...]) -> tuple[Any, ...]:
    # SQLite has no NaN: it writes null, whoever asks it to.
    return tuple("NaN" if isinstance(v, float) and math.isnan(v) else v for v in row)


def read(conn: sa.Connection, table: sa.Table) -> list[tuple[Any, ...]]:
    return [shown(tuple(r)) for r in conn.execute(sa.select(table).order_by(table.c.id))]


SLOW = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@SLOW
@given(rows=st.lists(VALUES, max_size=8), again=VALUES)
def test_inserted_rows_are_those_that_sqlalchemy_writes(engine, rows, again) -> None:
    with engine.connect() as conn:
        ours, theirs = fresh(conn), fresh(conn)
        numbered = [(i, *row) for i, row in enumerate(rows)]
        insert_many(conn, ours, ("id", *NAMES), numbered)
        for row in numbered:
            conn.execute(sa.insert(theirs).values(dict(zip(("id", *NAMES), row, strict=True))))
        assert read(conn, ours) == read(conn, theirs)
        assert len(read(conn, ours)) == len(rows)
        if rows:  # the first that came stays
            insert_many(conn, ours, ("id", *NAMES), [(0, *again), (len(rows), *again)])
            assert read(conn, ours)[:-1] == read(conn, theirs)
        conn.rollback()


@SLOW
@given(
    rows=st.lists(st.tuples(VALUES, VALUES), max_size=8),
    gone=st.integers(0, 8),
    names=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_updated_rows_are_those_that_sqlalchemy_writes(engine, rows, gone, names) -> None:
    chosen = tuple(sorted(names))
    with engine.connect() as conn:
        ours, theirs = fresh(conn), fresh(conn)
        for table in (ours, theirs):
            insert_many(conn, table, ("id", *NAMES), [(i, *old) for i, (old, _) in enumerate(rows)])
        new = [dict(zip(NAMES, row, strict=True)) for _, row in rows]
        changes = [(*(v[n] for n in chosen), i) for i, v in enumerate(new) if i != gone]
        update_many(conn, ours, "id", chosen, [*changes, (*[None] * len(chosen), 99)])
        for i, v in enumerate(new):
            if i != gone:
                change = sa.update(theirs).where(theirs.c.id == i)
                conn.execute(change.values({n: v[n] for n in chosen}))
        assert read(conn, ours) == read(conn, theirs)
        conn.rollback()
