"""What the ledger's tests do over and over."""

from __future__ import annotations

import time
from collections.abc import Callable

from service import instruments
from service.labels import LabelItem
from tests.service.streams import IDENTITY, LEVEL, MODEL, VERSION, Exposition


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # only how often to look


def metric(name: str, **labels: str) -> float:
    return Exposition(instruments.render().decode()).total(name, **labels)


def record(ledger, stream, rows=None, *, model=MODEL, version=VERSION, level=LEVEL, group=None):
    rows = list(range(len(stream.ids))) if rows is None else rows
    ids = [stream.ids[i] for i in rows]
    return ledger.record(model, version, IDENTITY, ids, stream.rows(rows), level, group)


def labels(stream, rows=None, *, model: str | None = MODEL):
    rows = range(len(stream.ids)) if rows is None else rows
    return [LabelItem(model, stream.ids[i], stream.label(i)) for i in rows]


def join(ledger, limit=1000):
    rows = []
    while page := ledger.claim(limit):
        rows += page
    return rows


def entry(ledger, **options):
    (found,) = ledger.calibration(**options)["models"]
    return found
