"""Answered predictions on their way into the metrics and the ledger, many requests together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from posthoc.contract import Array
from service import instruments
from service.ledger import Ledger
from service.models import Model

_log = logging.getLogger("hedged.record")


class Predicted(NamedTuple):
    """One answered request of N rows, or images by their `service.images.summary`.

    ``levels``: the names of the levels of their sets or intervals, one for all rows or one per
    row; None for one that is not the bundle's own.
    """

    model: Model
    levels: Sequence[str | None]
    ids: list[str]
    fields: dict[str, Array]
    group: Array | None


def record(ledger: Ledger, predicted: Iterable[Predicted]) -> None:
    """Count predictions and hand them to the ledger; what goes wrong is logged."""
    parts: dict[tuple[Model, str | None], list[Predicted]] = {}
    for one in predicted:
        for part in _by_level(one):
            parts.setdefault((one.model, part.levels[0]), []).append(part)
    for (model, level), many in parts.items():
        try:
            _record(ledger, model, level, many[0] if len(many) == 1 else _joined(many))
        except Exception:
            _log.exception("predictions of %s could not be recorded", model.name)


def _record(ledger: Ledger, model: Model, level: str | None, of: Predicted) -> None:
    name, version = model.name, model.version
    if model.dense is not None:
        instruments.observe_images(name, version, of.fields, level)
        ledger.record_images(name, version, model.identity, of.ids, of.fields, level)
        return
    instruments.observe_prediction(name, version, of.fields, level)
    if of.group is not None:
        known = model.predictor.known_groups(of.group)
        instruments.count_unknown_groups(name, version, int((~known).sum()))
    ledger.record(name, version, model.identity, of.ids, of.fields, level, group=of.group)


def _by_level(one: Predicted) -> Iterator[Predicted]:
    """A request in parts of one level each."""
    found = dict.fromkeys(one.levels)
    if len(found) == 1:
        yield one
        return
    for level in found:
        rows = [row for row, named in enumerate(one.levels) if named == level]
        yield Predicted(
            model=one.model,
            levels=(level,),
            ids=[one.ids[row] for row in rows],
            fields={name: value[rows] for name, value in one.fields.items()},
            group=None if one.group is None else one.group[rows],
        )


def _joined(many: Sequence[Predicted]) -> Predicted:
    first, fields = many[0], [one.fields for one in many]
    groups = [one.group for one in many if one.group is not None]
    return Predicted(
        model=first.model,
        levels=first.levels[:1],
        ids=list(chain.from_iterable([one.ids for one in many])),
        fields={name: np.concatenate(list(map(itemgetter(name), fields))) for name in first.fields},
        group=np.concatenate(groups) if groups else None,
    )
