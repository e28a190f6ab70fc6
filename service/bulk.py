"""Labels in bulk: what a file holds goes into a ledger, and every row that does not is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from service import store
from service.ids import valid_id
from service.labelfile import Row
from service.labels import LabelItem
from service.upkeep import Upkeep

REJECTED = ("invalid", "conflict")


def load(
    ledger: Upkeep,
    parts: Iterable[tuple[list[Row], int]],
    *,
    model: str | None,
    tell: Callable[[int, int], None],
    reject: Callable[[Row, str, str], None],
) -> Counter[str]:
    """Put labels into a ledger; how many had which result.

    ``model`` is that of every row, None where rows say it themselves. ``tell`` hears (rows done,
    rows in all, about); ``reject`` gets each row of REJECTED, its result and the reason. What was
    loaded before an error stays: the same rows again are ``duplicate``.
    """
    counts: Counter[str] = Counter()
    for rows, total in parts:
        for start in range(0, len(rows), store.CHUNK):
            part = rows[start : start + store.CHUNK]
            results = _load(ledger, part, model)
            counts.update(results)
            for row, result in zip(part, results, strict=True):
                if result in REJECTED:
                    reject(row, result, _reason(row, result))
            tell(counts.total(), max(total, counts.total()))
    return counts


def _load(ledger: Upkeep, rows: Sequence[Row], model: str | None) -> list[str]:
    items = [LabelItem(model or r.model, r.id, r.label) for r in rows if r.fault is None]
    found = iter(ledger.add_labels(items) if items else ())
    return ["invalid" if r.fault else next(found) for r in rows]


def _reason(row: Row, result: str) -> str:
    if row.fault is not None:
        return row.fault
    if result == "conflict":
        return "another label of this prediction is there, and stays"
    if not isinstance(row.id, str) or not valid_id(row.id):
        return "the id must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -"
    if row.label is None:
        return "there is no label"
    return (
        "the label fits no version of the model that may have predicted, or it is not known which "
        "model the id is of"
    )
