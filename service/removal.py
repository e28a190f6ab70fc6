"""What leaves the ledger: erased by id, too old, or given up. Every function takes an open
connection, and a bounded part at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sqlalchemy as sa

from service.schema import images, labels, predictions
from service.store import count_feedback, sources


def forget(conn: sa.Connection, id: str, model: str | None) -> int:
    """Erase a prediction and its label; how many predictions there were."""
    erased = []
    for table in (labels, predictions, images):
        chosen = [table.c.id == id, *([] if model is None else [table.c.model == model])]
        erased.append(int(conn.execute(sa.delete(table).where(*chosen)).rowcount))
    return sum(erased[1:])


def expire(conn: sa.Connection, before: float, limit: int) -> list[str]:
    """Remove up to ``limit`` labels received before a time whose prediction never came.

    Returns their models.
    """
    there = sa.exists().where(
        predictions.c.model == labels.c.model, predictions.c.id == labels.c.id
    )
    old = sa.select(labels.c.seq).where(
        labels.c.joined.is_(None), labels.c.received < before, ~there
    )
    keys = (
        conn.execute(old.limit(limit).with_for_update(of=labels, skip_locked=True)).scalars().all()
    )
    stmt = sa.delete(labels).where(labels.c.seq.in_(keys)).returning(labels.c.model)
    models = list(conn.execute(stmt).scalars()) if keys else []
    count_feedback(conn, Counter((m, "expired") for m in models))
    return models


def purge(conn: sa.Connection, before: float, limit: int) -> int:
    """Remove up to ``limit`` predictions made before a time, with their labels; how many.

    One whose label no joiner has claimed yet stays, since the counters do not know of it. Labels
    that were joined stay in the counts of `feedback_counts`.
    """
    removed = 0
    joined: Counter[tuple[str, str]] = Counter()
    for key in sources(conn):
        for table in (predictions, images):
            if limit > removed:
                rows = _delete_old(conn, table, key, before, limit - removed)
                removed += len(rows)
                if table is predictions:
                    joined += _delete_labels(conn, rows)
    count_feedback(conn, joined)
    return removed


def _delete_old(
    conn: sa.Connection, table: sa.Table, bundle: int, before: float, limit: int
) -> list[tuple[str, str]]:
    """(model, id) of the rows removed."""
    pending = sa.exists().where(
        labels.c.model == table.c.model, labels.c.id == table.c.id, labels.c.joined.is_(None)
    )
    old = sa.select(table.c.seq, table.c.model, table.c.id).where(
        table.c.bundle == bundle, table.c.time < before, ~pending
    )
    rows = conn.execute(
        old.order_by(table.c.time).limit(limit).with_for_update(of=table, skip_locked=True)
    ).all()
    if rows:
        conn.execute(sa.delete(table).where(table.c.seq.in_([r.seq for r in rows])))
    return [(r.model, r.id) for r in rows]


def _delete_labels(
    conn: sa.Connection, keys: Sequence[tuple[str, str]]
) -> Counter[tuple[str, str]]:
    """Remove the labels of removed predictions of one bundle; what to add to ``feedback``."""
    if not keys:
        return Counter()
    model, ids = keys[0][0], [id for _, id in keys]
    chosen = (labels.c.model == model, labels.c.id.in_(ids), labels.c.joined.is_not(None))
    return Counter(
        {(model, "joined"): int(conn.execute(sa.delete(labels).where(*chosen)).rowcount)}
    )
