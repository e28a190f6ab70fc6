"""Predictions of one bundle beside their labels, read from a ledger for a renewal.

Read page by page, each in a short transaction of its own, so that a service goes on writing
meanwhile. Labels that no joiner has counted yet are read too. What is held is bounded: beyond
``most`` rows those with the smallest hash of their id stay, which are a uniform sample.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from calibration.bundle import Bundle
from calibration.conformal.cells import UNKNOWN
from calibration.conformal.randomise import uniforms
from calibration.metrics.totals import BIN_LABELS
from calibration.renew.rows import Labelled, Window, id_keys
from posthoc.contract import Array, DataError
from service import store
from service.labels import Label, parse_label
from service.rows import Source
from service.schema import LedgerError, labels, predictions
from service.upkeep import Upkeep, opened

MOST_ROWS = 200_000
MOST_BYTES = 256 << 20  # of predictions in memory, about; a renewal holds some copies
_ROW_BYTES = 200
_SAMPLE = (1 << 63) + 1  # of the sample: no seed that a user gives

_COLUMNS = (
    *(predictions.c[c] for c in ("id", "grp", "label", "confidence", "bin")),
    *(predictions.c[c] for c in ("probs", "mean", "std", "time")),
)


@dataclass(frozen=True, slots=True)
class Page:
    """Some labelled rows, the confidence bin of each (None: regression), and how many labels were
    looked at that cannot be read."""

    rows: Labelled
    bins: list[int | None]
    unfit: int


def fresh(
    ledger: str | Path,
    bundle: Bundle,
    since: float,
    *,
    most: int | None = None,
    tell: Callable[[int], None] = lambda n: None,
) -> tuple[Labelled, Window]:
    """The labelled predictions that ``bundle`` made since a time (seconds since the epoch), at most
    ``most`` of them (by default as many as MOST_ROWS and MOST_BYTES allow), and what they are of.

    ``tell`` hears how many were read. Raises LedgerError for a ledger that cannot be read, and for
    one that has no predictions of this very bundle, naming those that it has.
    """
    until = time.time()
    with opened(ledger) as found:
        key, source = _of(found, bundle)
        if most is None:
            width = (source.width or 1) * (1 if source.task == "classification" else 4)
            most = max(1, min(MOST_ROWS, MOST_BYTES // (4 * width + _ROW_BYTES)))
        kept: list[Labelled] = []
        read = held = unfit = 0
        bins: Counter[int] = Counter()
        for page in pages(found, key, source, since):
            kept.append(page.rows)
            read, held, unfit = read + len(page.rows), held + len(page.rows), unfit + page.unfit
            bins.update(b for b in page.bins if b is not None)
            if held > 2 * most:
                kept = [_sample(kept, most)]
                held = most
            tell(read)
        served = _served(found, key, since)
    by_confidence = tuple(
        (BIN_LABELS[b], n, bins[b]) for b, n in sorted(served.items()) if b is not None
    )
    window = Window(since, until, sum(served.values()), read, unfit, by_confidence)
    return _sample(kept, most), window


def pages(ledger: Upkeep, key: int, source: Source, since: float) -> Iterator[Page]:
    """The labelled predictions of one bundle since a time, at most `store.CHUNK` at once."""
    last = -1
    while True:
        stmt = (
            sa.select(labels.c.seq, labels.c.value, *_COLUMNS)
            .select_from(store.labels_with(predictions))
            .where(labels.c.model == source.model, labels.c.seq > last)
            .where(predictions.c.bundle == key, predictions.c.time >= since)
            .order_by(labels.c.seq)
            .limit(store.CHUNK)
        )
        with ledger.reading() as conn:
            found = conn.execute(stmt).all()
        if not found:
            return
        last = found[-1].seq
        read = [(r, _value(r.value, source)) for r in found]
        good = [(r, y) for r, y in read if y is not None]
        if good or len(read) > len(good):
            yield Page(_rows(good, source), [r.bin for r, _ in good], len(read) - len(good))


def _of(ledger: Upkeep, bundle: Bundle) -> tuple[int, Source]:
    """The key of a bundle in the ledger."""
    m = bundle.manifest
    with ledger.reading() as conn:
        known = store.sources(conn)
    for key, source in known.items():
        if (source.model, source.identity) == (m.name, bundle.identity):
            return key, source
    there = ", ".join(f"{s.model} {s.version} ({s.identity[:12]}…)" for s in known.values())
    raise LedgerError(
        f"the ledger has no predictions of {m.name} {m.version} ({bundle.identity[:12]}…); it has "
        f"{there or 'none at all'}: give the bundle that made them"
    )


def _value(text: str, source: Source) -> Label | None:
    """What a stored label means to the bundle that predicted; None for one that means nothing."""
    try:
        value = json.loads(text)
        return parse_label(value, source.task, classes=source.classes, width=source.width)
    except DataError:
        return None


def _rows(good: Sequence[tuple[Any, Label]], source: Source) -> Labelled:
    """Rows of the store as arrays."""
    found = [r for r, _ in good]
    keys = id_keys([r.id for r in found])
    group = np.asarray([UNKNOWN if r.grp is None else r.grp for r in found], np.int64)
    times = np.asarray([r.time for r in found], np.float64)
    if source.task == "classification":
        return Labelled(
            keys,
            np.asarray([y for _, y in good], np.int64),
            group,
            label=np.asarray([r.label for r in found], np.int64),
            probs=_matrix([r.probs for r in found], source.width),
            confidence=np.asarray([r.confidence for r in found], np.float64),
            time=times,
        )
    return Labelled(
        keys,
        np.asarray([y for _, y in good], np.float64).reshape(len(good), -1),
        group,
        mean=_matrix([r.mean for r in found], source.width),
        std=_matrix([r.std for r in found], source.width),
        time=times,
    )


def _matrix(blobs: Sequence[bytes | None], width: int | None) -> Array | None:
    """N×width float32 of N equally long blobs; None where the store has none."""
    if any(b is None for b in blobs):
        return None
    matrix = np.frombuffer(b"".join(b for b in blobs if b is not None), "<f4")
    return matrix.reshape(len(blobs), -1 if blobs else width or 0).astype(np.float32)


def _sample(parts: Sequence[Labelled], most: int) -> Labelled:
    """All rows of some parts, or ``most`` of them by a hash of their id."""
    whole = _joined(parts)
    if len(whole) <= most:
        return whole
    order = np.lexsort((whole.keys, uniforms(whole.keys, _SAMPLE)))
    return whole.take(np.sort(order[:most]))


def _joined(parts: Sequence[Labelled]) -> Labelled:
    if not parts:
        none = np.zeros(0)
        return Labelled(none.astype(np.uint64), none, none.astype(np.int64))
    columns: dict[str, Any] = {}
    for f in fields(Labelled):
        values = [getattr(p, f.name) for p in parts]
        columns[f.name] = None if any(v is None for v in values) else np.concatenate(values)
    return Labelled(**columns)


def _served(ledger: Upkeep, key: int, since: float) -> dict[int | None, int]:
    """Predictions of a bundle since a time, by confidence bin (None: regression)."""
    stmt = (
        sa.select(predictions.c.bin, sa.func.count())
        .where(predictions.c.bundle == key, predictions.c.time >= since)
        .group_by(predictions.c.bin)
    )
    with ledger.reading() as conn:
        return {b: int(n) for b, n in conn.execute(stmt)}
