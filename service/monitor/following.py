"""New rows of a ledger, in the order in which it got them, read once each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from posthoc.contract import F64, Array
from service import store
from service.labels import Joined
from service.rows import Source
from service.schema import labels, predictions

PAGE = 5000  # rows read at once
_NUMBERS = ("confidence", "entropy", "set_size", "ood_pvalue", "label")


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a ledger has been read: the ``seq`` of its last prediction, and the time and ``seq``
    of the last label that was joined."""

    prediction: int = 0
    joined: float = 0.0
    label: int = 0


@dataclass(frozen=True, slots=True)
class Predicted:
    """N predictions of one bundle: seconds since the epoch, N numbers of each field that it has,
    and N×C probabilities where they are kept. Of a regression ``std`` is the mean over its
    outputs."""

    source: Source
    time: F64
    fields: dict[str, F64]
    probs: Array | None


def predictions_after(
    conn: sa.Connection, cursor: Cursor, until: float
) -> tuple[list[Predicted], Cursor]:
    """At most PAGE predictions that came after ``cursor``, by bundle, and the cursor behind them.

    Reading stops at the first that was made after ``until``: a transaction that was begun earlier
    may still bring rows before it.
    """
    columns = [predictions.c[name] for name in ("seq", "bundle", "time", "std", "probs", *_NUMBERS)]
    stmt = sa.select(*columns).where(predictions.c.seq > cursor.prediction)
    by_bundle: dict[int, list[Any]] = defaultdict(list)
    last = cursor.prediction
    for row in conn.execute(stmt.order_by(predictions.c.seq).limit(PAGE)):
        if row.time > until:
            break
        by_bundle[row.bundle].append(row)
        last = row.seq
    known = store.sources(conn) if by_bundle else {}
    found = [_predicted(known[bundle], rows) for bundle, rows in by_bundle.items()]
    return found, Cursor(last, cursor.joined, cursor.label)


def labels_after(conn: sa.Connection, cursor: Cursor, until: float) -> tuple[list[Joined], Cursor]:
    """At most PAGE labels that were joined after ``cursor`` and until a time, and the cursor behind
    them."""
    joined, seq = labels.c.joined, labels.c.seq
    later = sa.or_(joined > cursor.joined, sa.and_(joined == cursor.joined, seq > cursor.label))
    stmt = (
        sa.select(seq, joined, labels.c.value, *store.JOINED)
        .select_from(store.labels_with(predictions))
        .where(joined.is_not(None), joined <= until, later)
        .order_by(joined, seq)
        .limit(PAGE)
    )
    found = conn.execute(stmt).all()
    if not found:
        return [], cursor
    rows = [store.joined_row(rest, json.loads(value)) for _, _, value, *rest in found]
    return rows, Cursor(cursor.prediction, found[-1][1], found[-1][0])


def newest(conn: sa.Connection) -> float | None:
    """When the latest prediction was made that a ledger holds."""
    found = conn.execute(sa.select(sa.func.max(predictions.c.time))).scalar()
    return None if found is None else float(found)


def _predicted(source: Source, rows: Sequence[Any]) -> Predicted:
    fields = {}
    for name in _NUMBERS:
        values = [getattr(row, name) for row in rows]
        if all(value is not None for value in values):
            fields[name] = np.array(values, np.float64)
    if all(row.std is not None for row in rows):
        stds = [np.frombuffer(row.std, "<f4").mean(dtype=np.float64) for row in rows]
        fields["std"] = np.array(stds, np.float64)
    probs = None
    if all(row.probs is not None for row in rows):
        probs = np.frombuffer(b"".join(row.probs for row in rows), "<f4").reshape(len(rows), -1)
    return Predicted(source, np.array([row.time for row in rows], np.float64), fields, probs)
