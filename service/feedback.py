"""Labels as clients send them: one JSON object, a list of objects, NDJSON, or a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from service.errors import ServiceError, invalid, shorten
from service.ids import valid_id
from service.labels import LabelItem
from service.ledger import Ledger
from service.media import ARROW, NDJSON, PARQUET
from service.models import Model
from service.tensors import kind, parse_json

TABLES = frozenset({PARQUET, ARROW})
_KEYS = frozenset({"id", "label", "model"})


def parse_labels(
    body: bytes,
    content_type: str,
    known: Callable[[str | None], str],
    limit: int,
    max_bytes: int,
    dense: Collection[str] = (),
) -> tuple[list[LabelItem], bool]:
    """Label items, and whether the body was a single object.

    ``known`` gives the name of a model that is there (None: of the only one). A class may be given
    by name or index, a regression target as a number or a list of K numbers; which of them fits is
    left to the ledger. Raises ServiceError 400 naming an item that is none of these (422 where its
    model is one of those that are ``dense`` now), and 413 for more than ``limit`` items and for a
    table that unpacks to more than ``max_bytes``. Then none of them counts.
    """
    if content_type == NDJSON:
        lines = [line for line in body.splitlines() if line.strip()]
        check_count(len(lines), limit)
        values: Iterable[Any] = [parse_json(line, f"line {n}") for n, line in enumerate(lines, 1)]
        single = False
    elif content_type in TABLES:
        from service.labeltable import parse_table  # it takes pyarrow, which is slow to import

        values, single = parse_table(body, content_type, limit, max_bytes), False
    else:
        value = parse_json(body)
        single = not isinstance(value, list)
        values = [value] if single else value
        check_count(len(values), limit)
    items = [
        _item(value, "the label" if single else f"label {n}", known, dense)
        for n, value in enumerate(values)
    ]
    if not items:
        raise invalid("no label was given")
    return items, single


def dense_models(models: Mapping[str, Model]) -> frozenset[str]:
    """The names of those that predict maps."""
    return frozenset(name for name, model in models.items() if model.dense is not None)


def keep(items: Sequence[LabelItem], models: Mapping[str, Model], ledger: Ledger) -> list[str]:
    """Give labels to the ledger, which knows the version that predicted; the result of each.

    Raises ServiceError 422, and none of them counts, where one of the served ``models`` predicts
    maps and no version of it ever predicted rows: no map is kept that a label could be joined with.
    Raises LedgerError while the store is away.
    """
    asked = dense_models(models) & {item.model for item in items if item.model is not None}
    of_rows = {source.model for source in ledger.sources(math.inf)} if asked else set()
    only_maps = asked - of_rows
    for n, item in enumerate(items):
        if item.model in only_maps:
            raise _of_maps(f"label {n}", item.model)
    return ledger.add_labels(items)


def results(items: Sequence[LabelItem], outcomes: Sequence[str]) -> dict[str, Any]:
    """The response: how many items had which result, and the result of each."""
    return {
        "counts": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "results": [
            {"id": item.id, "result": outcome}
            for item, outcome in zip(items, outcomes, strict=True)
        ],
    }


def unfit(item: LabelItem) -> ServiceError:
    """400 for a single label that the ledger found invalid."""
    return invalid(
        f"label {shorten(repr(item.label))} of {item.id!r} does not fit the version of "
        f"{item.model!r} that predicted; send one of its class names, a class index within "
        "range, or one finite number per output; of maps there are no labels"
    )


def status(outcomes: Sequence[str], single: bool) -> int:
    """A single conflict is 409; 202 where labels wait; else 200."""
    if single and outcomes[0] == "conflict":
        return 409
    return 202 if {"pending", "spooled"} & set(outcomes) else 200


def check_count(count: int, limit: int) -> None:
    """Raise ServiceError 413 for more labels than a request may hold."""
    if count > limit:
        raise ServiceError(413, "too_many_labels", f"{count} labels; a request holds {limit}")


def _of_maps(where: str, model: str | None) -> ServiceError:
    return ServiceError(
        422,
        "labels_of_maps",
        f"{where}: model {model!r} predicts maps, and of a map the ledger keeps a few numbers and "
        "no pixel that a label could be joined with; measure it on labelled images with: hedged "
        "evaluate BUNDLE --data IMAGES",
    )


def _item(
    value: Any, where: str, known: Callable[[str | None], str], dense: Collection[str]
) -> LabelItem:
    if not isinstance(value, dict):
        raise invalid(f"{where} is a JSON {kind(value)}; an object with id and label is needed")
    for key in value:
        if key not in _KEYS:
            raise invalid(f"{where}: unknown key {shorten(key)!r}; there are id, label, model")
    id, name = value.get("id"), value.get("model")
    if not isinstance(id, str) or not valid_id(id):
        raise invalid(f"{where}: 'id' must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -")
    if name is not None and not isinstance(name, str):
        raise invalid(f"{where}: 'model' must be a string")
    model = known(name)
    if "label" not in value:
        raise invalid(f"{where}: 'label' is missing")
    label = value["label"]
    if not _is_label(label):
        if model in dense and isinstance(label, list):
            raise _of_maps(where, model)
        raise invalid(
            f"{where}: {shorten(str(label))} is no label; send a class name, a class index, "
            "a number, or a list of numbers"
        )
    # What it means is for the ledger to say: the version that predicted may not be the one that
    # is served now, and may have other classes.
    return LabelItem(model=model, id=id, label=label)


def _is_label(value: Any) -> bool:
    """A string, a number, or a list of at least one number."""
    if isinstance(value, str):
        return True
    many = value if isinstance(value, list) else [value]
    return bool(many) and all(type(v) in (int, float) for v in many)
