"""What the ledger does inside one transaction. Every function takes an open connection."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, TypeVar, get_args

import sqlalchemy as sa

from posthoc.contract import DataError, Task
from service.labels import Joined, Label, LabelItem, parse_label
from service.many import insert_many, update_many
from service.rows import Row, Source
from service.schema import LedgerError, bundles, feedback, images, insert, labels, predictions

ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
R = TypeVar("R")
CHUNK = 1000  # rows per statement: SQLite binds at most 32,766 values
_FIRST_WAIT_S = 0.5
_LAST_WAIT_S = 3600.0

# The columns of ``Joined`` but for its value, in its order.
JOINED: tuple[sa.ColumnElement[Any], ...] = (
    *(bundles.c[c] for c in ("model", "version", "task")),
    predictions.c.time.label("predicted"),
    labels.c.received,
    *(predictions.c[c] for c in ("level", "label", "confidence", "probs", "set")),
    *(predictions.c[c] for c in ("mean", "std", "lower", "upper")),
)
_NAMES = tuple(str(c.key) for c in JOINED)


def bundle_key(conn: sa.Connection, source: Source) -> int:
    """The key of a bundle, which is inserted, or completed with what it lacked."""
    columns = {
        "identity": source.identity,
        "model": source.model,
        "version": source.version,
        "task": source.task,
        "width": source.width,
        "classes": None if source.classes is None else json.dumps(source.classes),
        "levels": None if source.levels is None else json.dumps(source.levels),
    }
    conn.execute(insert(conn, bundles).values(columns).on_conflict_do_nothing())
    same = sa.and_(*(bundles.c[k] == columns[k] for k in ("identity", "model", "version")))
    for name in ("width", "classes", "levels"):
        if columns[name] is not None:
            missing = same & bundles.c[name].is_(None)
            conn.execute(sa.update(bundles).where(missing).values({name: columns[name]}))
    return int(conn.execute(sa.select(bundles.c.bundle).where(same)).scalar_one())


def insert_predictions(
    conn: sa.Connection, bundle: int, rows: Sequence[Row], *, of_images: bool = False
) -> None:
    """Insert rows of one bundle, or summaries of its ``images``; a repeated id keeps the first."""
    ordered = _lock_order(conn, rows, lambda r: str(r["id"]))
    names = tuple(ordered[0])
    values = [(bundle, *map(r.__getitem__, names)) for r in ordered]
    insert_many(conn, images if of_images else predictions, ("bundle", *names), values)


def _lock_order(conn: sa.Connection, rows: Iterable[R], name: Callable[[R], str], /) -> Sequence[R]:
    """Rows in the order in which they came; on PostgreSQL in one that all writers have.

    Two writers that insert the same ids in different orders would deadlock there. That order is by
    a hash of the id: the monitor reads rows as they lie in the ledger, and an id may say much, such
    as a customer's age, so that by the id itself healthy rows would look like drift.
    """
    if conn.dialect.name == "sqlite":
        return list(rows)
    return sorted(rows, key=lambda r: blake2b(name(r).encode(), digest_size=16).digest())


def sources(conn: sa.Connection) -> dict[int, Source]:
    """Every bundle the ledger has met, by key, oldest first."""
    found = {}
    for r in conn.execute(sa.select(bundles).order_by(bundles.c.bundle)):
        names, levels = (
            None if text is None else tuple(json.loads(text)) for text in (r.classes, r.levels)
        )
        found[r.bundle] = Source(
            r.model, r.version, r.identity, task_of(r.task), r.width, names, levels
        )
    return found


def sources_since(conn: sa.Connection, since: float) -> list[Source]:
    """The bundles that have predicted since a time, oldest first."""
    recent = sa.exists().where(predictions.c.bundle == bundles.c.bundle, predictions.c.time > since)
    keys = set(conn.execute(sa.select(bundles.c.bundle).where(recent)).scalars())
    return [source for key, source in sources(conn).items() if key in keys]


def task_of(text: str) -> Task:
    """The task that a text names."""
    return next(t for t in get_args(Task) if t == text)


def insert_labels(conn: sa.Connection, items: Sequence[LabelItem], now: float) -> list[str]:
    """One result for each of at most CHUNK items; see ``Ledger.add_labels``."""
    known = sources(conn)
    newest_first = defaultdict(list)
    for s in reversed(known.values()):
        newest_first[s.model].append(s)
    named = _with_models(conn, items, newest_first)
    found = _find(conn, predictions, named, predictions.c.bundle)
    maps = _find(conn, images, named, images.c.bundle)
    results = [""] * len(items)
    first: dict[tuple[str, str], tuple[int, str]] = {}
    again: list[tuple[int, tuple[str, str]]] = []
    readers: dict[tuple[str, str], Sequence[Source | None]] = {}
    for i, (key, item) in enumerate(zip(named, items, strict=True)):
        if key is None or (key in maps and key not in found):
            results[i] = "invalid"
            continue
        # A name is resolved by the bundle that predicted. Until that is known, a label waits if
        # any bundle of its model can read it.
        bundle = found.get(key)
        readers[key] = [known[bundle[0]]] if bundle else newest_first.get(key[0], [None])
        try:
            value = _read(item.label, readers[key])
        except DataError:
            results[i] = "invalid"
            continue
        if key in first:
            again.append((i, key))
        else:
            first[key] = (i, json.dumps(value if bundle else plain_label(item.label)))
    inserted = _insert_new(conn, first, now)
    for key, (i, _) in first.items():
        if key in inserted:
            results[i] = "accepted" if key in found else "pending"
        else:
            again.append((i, key))
    stored = _find(conn, labels, [key for _, key in again], labels.c.value)
    for i, key in again:
        if key not in stored:
            raise LedgerError(f"the label of {key[1]!r} was erased meanwhile; send it again")
        same = _same(json.loads(stored[key][0]), items[i].label, readers[key])
        results[i] = "duplicate" if same else "conflict"
    names = [key[0] if key else x.model or "" for key, x in zip(named, items, strict=True)]
    count_feedback(conn, Counter(zip(names, results, strict=True)))
    return results


def _with_models(
    conn: sa.Connection, items: Sequence[LabelItem], models: Collection[str]
) -> list[tuple[str, str] | None]:
    """(model, id) of each item; None where the id is no id or the model stays open."""
    usable = [isinstance(x.id, str) and ID_PATTERN.fullmatch(x.id) is not None for x in items]
    open_ids = [x.id for x, ok in zip(items, usable, strict=True) if ok and x.model is None]
    owners: dict[str, set[str]] = defaultdict(set)
    if open_ids and len(models) > 1:
        stmt = sa.select(predictions.c.id, predictions.c.model)
        for r in conn.execute(stmt.where(predictions.c.id.in_(open_ids))):
            owners[r.id].add(r.model)
    only = next(iter(models)) if len(models) == 1 else None
    out: list[tuple[str, str] | None] = []
    for item, ok in zip(items, usable, strict=True):
        model = item.model or only
        if ok and model is None and len(owners[item.id]) == 1:
            (model,) = owners[item.id]
        out.append((model, item.id) if ok and model is not None else None)
    return out


def _read(value: Any, readers: Sequence[Source | None]) -> Label | str:
    """What the first of the readers that can read a label makes of it, else DataError."""
    for reader in readers[:-1]:
        with suppress(DataError):
            return _parse(value, reader)
    return _parse(value, readers[-1])


def _parse(value: Any, source: Source | None) -> Label | str:
    if source is not None:
        return parse_label(value, source.task, classes=source.classes, width=source.width)
    # Nothing is known of the model: any form of label waits for its prediction.
    if isinstance(value, str):
        return value
    return parse_label(value, "regression")


def _same(stored: Any, value: Any, readers: Sequence[Source | None]) -> bool:
    """Whether two labels mean the same to the first reader that can read both."""
    for reader in readers:
        with suppress(DataError):
            return _parse(stored, reader) == _parse(value, reader)
    return False  # what came before its model was known does not fit, and will be removed


def plain_label(value: Any) -> Any:
    """A label as JSON can hold it. Raises TypeError or ValueError for what can be no label."""
    if isinstance(value, bool):
        raise TypeError("a boolean is no label")
    return value if isinstance(value, str | float | list | tuple) else int(value)


def _insert_new(
    conn: sa.Connection, first: Mapping[tuple[str, str], tuple[int, str]], now: float
) -> set[tuple[str, str]]:
    rows = [
        {"model": m, "id": i, "value": text, "received": now, "next_try": now}
        for (m, i), (_, text) in _lock_order(conn, first.items(), lambda item: "\0".join(item[0]))
    ]
    if not rows:
        return set()
    stmt = insert(conn, labels).on_conflict_do_nothing().returning(labels.c.model, labels.c.id)
    return {(r.model, r.id) for r in conn.execute(stmt, rows)}


def _find(
    conn: sa.Connection,
    table: sa.Table,
    keys: Iterable[tuple[str, str] | None],
    column: sa.Column[Any],
) -> dict[tuple[str, str], tuple[Any]]:
    """``column`` of the rows of ``table`` that have one of the (model, id) keys."""
    by_model: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        if key is not None:
            by_model[key[0]].append(key[1])
    out: dict[tuple[str, str], tuple[Any]] = {}
    for model, ids in by_model.items():
        stmt = sa.select(table.c.id, column).where(table.c.model == model, table.c.id.in_(ids))
        out.update({(model, r[0]): (r[1],) for r in conn.execute(stmt)})
    return out


def count_feedback(conn: sa.Connection, counts: Mapping[tuple[str, str], int]) -> None:
    """Add to the counts of (model, result); models that the ledger does not know share ""."""
    known = {s.model for s in sources(conn).values()}
    totals: Counter[tuple[str, str]] = Counter()
    for (model, result), n in counts.items():
        totals[model if model in known else "", result] += n
    for (model, result), n in sorted(totals.items()):  # sorted: one lock order for all writers
        stmt = insert(conn, feedback).values(model=model, result=result, n=n)
        conn.execute(
            stmt.on_conflict_do_update(
                index_elements=["model", "result"], set_={"n": feedback.c.n + n}
            )
        )


def anything_due(conn: sa.Connection, now: float) -> bool:
    """Whether a pending label may be looked at; costs no write lock."""
    due = sa.select(labels.c.seq).where(labels.c.joined.is_(None), labels.c.next_try <= now)
    return conn.execute(due.limit(1)).first() is not None


def claim(conn: sa.Connection, limit: int, now: float) -> tuple[list[Joined], list[str], int]:
    """Mark up to ``limit`` due labels whose prediction is there as joined.

    Returns the joined rows, the models of labels that no longer fit their prediction (removed),
    and how many due labels were looked at. A label without a prediction is tried again after half
    its age, so that many strangers cost little.
    """
    stmt = (
        sa.select(labels.c.seq, labels.c.value, predictions.c.bundle, *JOINED)
        .select_from(labels_with(predictions, outer=True))
        .where(labels.c.joined.is_(None), labels.c.next_try <= now)
        .order_by(labels.c.next_try, labels.c.seq)
        .limit(limit)
        .with_for_update(of=labels, skip_locked=True)
    )
    due = conn.execute(stmt).all()
    known = sources(conn) if due else {}
    rows: list[Joined] = []
    taken: list[tuple[float, str, int]] = []
    unfit: list[tuple[int, str]] = []
    waiting: list[tuple[float, int]] = []
    for seq, value, bundle, *rest in due:
        if bundle is None:
            wait = min(max((now - rest[4]) / 2, _FIRST_WAIT_S), _LAST_WAIT_S)
            waiting.append((now + wait, seq))
            continue
        source = known[bundle]
        try:
            label = parse_label(
                json.loads(value), source.task, classes=source.classes, width=source.width
            )
        except DataError:
            unfit.append((seq, source.model))
            continue
        taken.append((now, json.dumps(label), seq))
        rows.append(joined_row(rest, label))
    if taken:
        update_many(conn, labels, "seq", ("joined", "value"), taken)
    if unfit:
        conn.execute(sa.delete(labels).where(labels.c.seq.in_([s for s, _ in unfit])))
        count_feedback(conn, Counter((m, "invalid") for _, m in unfit))
    if waiting:
        update_many(conn, labels, "seq", ("next_try",), waiting)
    return rows, [m for _, m in unfit], len(due)


def joined_row(columns: Sequence[Any], value: Label) -> Joined:
    """A row from the values of JOINED."""
    return Joined(**dict(zip(_NAMES, columns, strict=True)), value=value)


def labels_with(table: sa.Table, *, outer: bool = False) -> sa.Join:
    """Labels beside the rows of ``table`` that they belong to, and their bundles."""
    on = (labels.c.model == table.c.model) & (labels.c.id == table.c.id)
    joined = labels.join(table, on, isouter=outer)
    return joined.join(bundles, bundles.c.bundle == table.c.bundle, isouter=outer)


def joined_pages(
    conn: sa.Connection, model: str | None, since: float | None
) -> Iterator[list[Joined]]:
    """Joined rows in pages of CHUNK, of one model and of predictions since a time, or of all."""
    last = -1
    while True:
        stmt = (
            sa.select(labels.c.seq, labels.c.value, *JOINED)
            .select_from(labels_with(predictions))
            .where(labels.c.joined.is_not(None), labels.c.seq > last)
            .where(*only(predictions, model, since))
            .order_by(labels.c.seq)
            .limit(CHUNK)
        )
        page = conn.execute(stmt).all()
        if not page:
            return
        yield [joined_row(rest, json.loads(value)) for _, value, *rest in page]
        last = page[-1][0]


def only(table: sa.Table, model: str | None, since: float | None) -> list[Any]:
    """What holds of rows of one model, or of any, since a time."""
    chosen: list[Any] = [] if model is None else [table.c.model == model]
    return chosen if since is None else [*chosen, table.c.time >= since]
