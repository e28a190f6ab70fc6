"""New rows of a ledger, in the order in which it got them, read once each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa

from posthoc.contract import F64, Array
from service import store
from service.images import summarised
from service.labels import Joined
from service.rows import Source
from service.schema import images, labels, predictions

PAGE = 5000  # rows read at once, and images
_NUMBERS = ("confidence", "entropy", "set_size", "ood_pvalue", "label")
_OF_IMAGES = tuple(dict.fromkeys((*summarised("classification"), *summarised("regression"))))


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a ledger has been read: the ``seq`` of its last prediction and of its last image, and
    the time and ``seq`` of the last label that was joined."""

    prediction: int = 0
    joined: float = 0.0
    label: int = 0
    image: int = 0


@dataclass(frozen=True, slots=True)
class Predicted:
    """N predictions of one bundle: seconds since the epoch, N numbers of each field that it has,
    and N×C probabilities where they are kept. Of a regression ``std`` is the mean over its
    outputs. Of a dense bundle (``source.images``) N images, by their `service.images.summary`."""

    source: Source
    time: F64
    fields: dict[str, F64]
    probs: Array | None


def predictions_after(
    conn: sa.Connection, cursor: Cursor, until: float
) -> tuple[list[Predicted], Cursor]:
    """At most PAGE predictions and PAGE images that came after ``cursor``, by bundle, and the
    cursor behind them.

    Reading stops at the first that was made after ``until``: a transaction that was begun earlier
    may still bring rows before it.
    """
    rows, prediction = _after(
        conn, predictions, ("std", "probs", *_NUMBERS), cursor.prediction, until
    )
    maps, image = _after(conn, images, _OF_IMAGES, cursor.image, until)
    known = store.sources(conn) if rows or maps else {}
    found = [_predicted(known[bundle], of) for bundle, of in rows.items()]
    found += [_images(known[bundle], of) for bundle, of in maps.items()]
    return found, replace(cursor, prediction=prediction, image=image)


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
    return rows, replace(cursor, joined=found[-1][1], label=found[-1][0])


def _after(
    conn: sa.Connection, table: sa.Table, names: Sequence[str], last: int, until: float
) -> tuple[dict[int, list[Any]], int]:
    """At most PAGE rows of a table behind the ``seq`` ``last``, by bundle, and the new last."""
    columns = [table.c[name] for name in ("seq", "bundle", "time", *names)]
    stmt = sa.select(*columns).where(table.c.seq > last).order_by(table.c.seq).limit(PAGE)
    by_bundle: dict[int, list[Any]] = defaultdict(list)
    for row in conn.execute(stmt):
        if row.time > until:
            break
        by_bundle[row.bundle].append(row)
        last = row.seq
    return by_bundle, last


def _predicted(source: Source, rows: Sequence[Any]) -> Predicted:
    fields = _numbers(rows, _NUMBERS)
    if all(row.std is not None for row in rows):
        stds = [np.frombuffer(row.std, "<f4").mean(dtype=np.float64) for row in rows]
        fields["std"] = np.array(stds, np.float64)
    probs = None
    if all(row.probs is not None for row in rows):
        probs = np.frombuffer(b"".join(row.probs for row in rows), "<f4").reshape(len(rows), -1)
    return Predicted(source, _times(rows), fields, probs)


def _images(source: Source, rows: Sequence[Any]) -> Predicted:
    numbers = _numbers(rows, _OF_IMAGES)  # the mean std of an image is a number already
    return Predicted(replace(source, images=True), _times(rows), numbers, None)


def _numbers(rows: Sequence[Any], names: Sequence[str]) -> dict[str, F64]:
    """Those of the columns that every row has."""
    found = {}
    for name in names:
        values = [getattr(row, name) for row in rows]
        if all(value is not None for value in values):
            found[name] = np.array(values, np.float64)
    return found


def _times(rows: Sequence[Any]) -> F64:
    return np.array([row.time for row in rows], np.float64)
