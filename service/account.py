"""What the rows of a ledger add up to."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import sqlalchemy as sa

from posthoc.contract import Task
from service import store
from service.labels import Totals, merge_totals, totals_of
from service.schema import bundles, feedback, images, labels, predictions
from service.store import only, task_of
from service.summary import summary_of

_MEANS = ("confidence", "entropy", "set_size", "std", "ood", "abstain")


def calibration(
    conn: sa.Connection, model: str | None = None, since: float | None = None
) -> dict[str, Any]:
    """Calibration of one model or of all; ``since`` (seconds since the epoch) leaves older
    predictions out. See `service.summary` for the keys."""
    totals: dict[tuple[str, str], Totals] = {}
    for page in store.joined_pages(conn, model, since):
        for key, part in totals_of(page).items():
            totals[key] = merge_totals(totals[key], part) if key in totals else part
    return summary_of(
        served_counts(conn, model, since),
        totals,
        feedback_counts(conn, model),
        since,
        image_means(conn, model, since),
        oldest(conn, model, since),
    )


def served_counts(
    conn: sa.Connection, model: str | None, since: float | None
) -> dict[tuple[str, str, Task], dict[int | None, tuple[int, float]]]:
    """(model, version, task) -> bin (None: regression) -> rows served, sum of confidence."""
    out: dict[tuple[str, str, Task], dict[int | None, tuple[int, float]]] = {}
    for key, s in store.sources(conn).items():
        if model not in (None, s.model):
            continue
        stmt = (
            sa.select(predictions.c.bin, sa.func.count(), sa.func.sum(predictions.c.confidence))
            .where(predictions.c.bundle == key, predictions.c.time >= (since or 0.0))
            .group_by(predictions.c.bin)
        )
        bins = out.setdefault((s.model, s.version, s.task), {})
        for b, n, total in conn.execute(stmt):
            old = bins.get(b, (0, 0.0))
            bins[b] = (old[0] + n, old[1] + (total or 0.0))
    return out


def image_means(
    conn: sa.Connection, model: str | None, since: float | None
) -> dict[tuple[str, str, Task], tuple[int, dict[str, float]]]:
    """(model, version, task) -> images served, and means over them of what their summaries hold."""
    key = (bundles.c.model, bundles.c.version, bundles.c.task)
    stmt = (
        sa.select(*key, sa.func.count(), *(sa.func.avg(images.c[name]) for name in _MEANS))
        .join(bundles, bundles.c.bundle == images.c.bundle)
        .where(*only(images, model, since))
        .group_by(*key)
    )
    return {
        (name, version, task_of(task)): (
            n,
            {k: float(v) for k, v in zip(_MEANS, means, strict=True) if v is not None},
        )
        for name, version, task, n, *means in conn.execute(stmt)
    }


def feedback_counts(conn: sa.Connection, model: str | None) -> dict[str, dict[str, int]]:
    """Model -> result -> labels; ``joined`` counts those that a purge removed, too, and
    ``waiting`` is as it is now."""
    out: dict[str, dict[str, int]] = defaultdict(dict)
    for r in conn.execute(sa.select(feedback).order_by(feedback.c.model, feedback.c.result)):
        out[r.model][r.result] = r.n
    waits = labels.c.joined.is_(None)
    stmt = sa.select(labels.c.model, waits, sa.func.count()).group_by(labels.c.model, waits)
    known = {s.model for s in store.sources(conn).values()}
    for name, waiting, n in conn.execute(stmt):
        counts, result = out[name if name in known else ""], "waiting" if waiting else "joined"
        counts[result] = counts.get(result, 0) + n
    return {m: out[m] for m in sorted(out) if model in (None, m)}


def oldest(
    conn: sa.Connection, model: str | None, since: float | None
) -> dict[tuple[str, str, Task], float]:
    """(model, version, task) -> when the oldest prediction was made that is there and counts."""
    out: dict[tuple[str, str, Task], float] = {}
    for key, s in store.sources(conn).items():
        if model not in (None, s.model):
            continue
        for table in (predictions, images):
            stmt = sa.select(sa.func.min(table.c.time)).where(table.c.bundle == key)
            if since is not None:
                stmt = stmt.where(table.c.time >= since)
            found, name = conn.execute(stmt).scalar(), (s.model, s.version, s.task)
            if found is not None:
                out[name] = min(found, out.get(name, found))
    return out
