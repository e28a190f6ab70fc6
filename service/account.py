"""What the rows of a ledger add up to."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from service import store
from service.labels import Totals, merge_totals, totals_of
from service.summary import summary_of


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
        store.served_counts(conn, model, since),
        totals,
        store.feedback_counts(conn, model),
        since,
        store.image_means(conn, model, since),
        store.oldest(conn, model, since),
    )
