"""Answered predictions on their way into the metrics and the ledger, many requests together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class Row(NamedTuple):
    """One answered request of one row, of a model without maps: what is recorded of it as bytes,
    one field after the other. Many of them become arrays at a fraction of the time that it takes
    to join as many small arrays, which have long left the processor's cache by then.
    """

    model: Model
    level: str | None
    id: str
    fields: bytes
    group: int | None


def kept(
    model: Model,
    levels: Sequence[str | None],
    ids: list[str],
    fields: Mapping[str, Array],
    group: Array | None,
) -> Predicted | Row:
    """An answered request in the form in which it waits to be recorded."""
    names = model.recorded
    if len(ids) > 1 or model.dense is not None:
        return Predicted(model, levels, ids, {name: fields[name] for name in names}, group)
    data = b"".join([fields[name].tobytes() for name in names])
    return Row(model, levels[0], ids[0], data, None if group is None else int(group[0]))


def record(ledger: Ledger, answered: Iterable[Predicted | Row]) -> None:
    """Count predictions and hand them to the ledger; what goes wrong is logged."""
    parts: dict[tuple[Model, str | None], list[Predicted | Row]] = {}
    for one in answered:
        if isinstance(one, Row):
            parts.setdefault((one.model, one.level), []).append(one)
            continue
        for part in _by_level(one):
            parts.setdefault((one.model, part.levels[0]), []).append(part)
    for (model, level), some in parts.items():
        try:
            many = list(_unpacked(some))
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


def _unpacked(some: Iterable[Predicted | Row]) -> Iterator[Predicted]:
    """The same in the same order, neighbouring rows together."""
    rows: list[Row] = []
    for one in some:
        if isinstance(one, Row):
            rows.append(one)
            continue
        if rows:
            yield _together(rows)
            rows = []
        yield one
    if rows:
        yield _together(rows)


def _together(rows: Sequence[Row]) -> Predicted:
    models, levels, ids, data, groups = zip(*rows, strict=True)
    model: Model = models[0]
    specs = {spec.name: spec for spec in model.predictor.manifest.outputs}
    layout = np.dtype([(name, specs[name].dtype, specs[name].shape[1:]) for name in model.recorded])
    table = np.frombuffer(b"".join(data), layout)
    if len(table) != len(rows):
        raise ValueError(f"{len(rows)} rows have the bytes of {len(table)}")
    fields = {name: np.ascontiguousarray(table[name]) for name in model.recorded}
    group = None if groups[0] is None else np.asarray(groups, np.int64)
    return Predicted(model, levels[:1], list(ids), fields, group)


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
