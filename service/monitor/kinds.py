"""Which kind of shift the latest rows of a bundle show, beside the first ones that a ledger has.

Rows of a classifier whose probabilities are kept; see `calibration.drift.shift_kind`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.drift import shift_kind
from calibration.drift.shift_kind import MOST_CLASSES, Reference, Shift
from posthoc.contract import DataError
from service.monitor.following import Predicted
from service.monitor.stream import Options


@dataclass(frozen=True, slots=True)
class Kinds:
    """The ``reference`` (None before the first row), whether it has ``pvalues``, and the cells of
    the ``latest`` rows after it."""

    reference: Reference | None = None
    pvalues: bool = False
    latest: tuple[int, ...] = ()


def feed(kinds: Kinds, page: Predicted, options: Options) -> Kinds:
    """The kinds after N more predictions of one bundle.

    Pages are left out whose rows have no probabilities, of one class or more than MOST_CLASSES, or
    no p-values where those before had them; and rows with a number that is not finite.
    """
    probs, fields = page.probs, page.fields
    if probs is None or not {"label", "confidence"} <= set(fields):
        return kinds
    if kinds.reference is None:
        if not 2 <= probs.shape[1] <= MOST_CLASSES:
            return kinds
        kinds = Kinds(shift_kind.start(probs.shape[1]), "ood_pvalue" in fields)
    known = kinds.reference
    assert known is not None
    if probs.shape[1] != known.classes or (kinds.pvalues and "ood_pvalue" not in fields):
        return kinds
    names = ("label", "confidence", "ood_pvalue") if kinds.pvalues else ("label", "confidence")
    columns = np.stack([fields[name] for name in names])
    fine = np.isfinite(columns).all(axis=0) & np.isfinite(probs).all(axis=1)
    label, confidence, *pvalue = columns[:, fine]
    cells = shift_kind.cells(label.astype(np.int64), confidence, pvalue[0] if pvalue else None)
    room = max(0, options.reference - known.n)
    if room and len(cells):
        known = shift_kind.update(known, cells[:room], probs[fine][:room])
    latest = (*kinds.latest, *cells[room:].tolist())[-options.window :]
    return replace(kinds, reference=known, latest=latest)


def statement(kinds: Kinds, options: Options) -> Shift | None:
    """What the latest window looks like; None until reference and window are full."""
    if kinds.reference is None or len(kinds.latest) < options.window:
        return None
    return shift_kind.compare(kinds.reference, np.array(kinds.latest, np.int64))


def to_json(kinds: Kinds) -> dict[str, Any]:
    """Plain JSON values, from which `from_json` makes equal kinds."""
    known = None if kinds.reference is None else shift_kind.to_json(kinds.reference)
    return {"reference": known, "pvalues": kinds.pvalues, "latest": list(kinds.latest)}


def from_json(saved: Mapping[str, Any]) -> Kinds:
    """The kinds that were saved. Raises DataError for anything else."""
    try:
        text, latest = saved["reference"], tuple(map(int, saved["latest"]))
        known = None if text is None else shift_kind.from_json(text)
        return Kinds(known, bool(saved["pvalues"]), latest)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"these are no saved kinds of shift ({e!r})") from e
