"""Ground truth that came later: what a label may be, and what joined labels add up to."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from calibration.metrics.totals import (
    ClassificationTotals,
    RegressionTotals,
    merge,
    update_classification,
    update_regression,
)
from posthoc.contract import Array, DataError, Task

Totals = ClassificationTotals | RegressionTotals
Label = int | list[float]


@dataclass(frozen=True, slots=True)
class LabelItem:
    """A label for one prediction; ``model`` may be None where the id tells which."""

    model: str | None
    id: str
    label: Any


@dataclass(frozen=True, slots=True)
class Joined:
    """A label beside the prediction it belongs to. Blobs are as in ``service.schema``."""

    model: str
    version: str
    task: Task
    value: Label
    predicted: float  # seconds since the epoch
    received: float
    level: str | None
    label: int | None
    confidence: float | None
    probs: bytes | None
    set: bytes | None
    mean: bytes | None
    std: bytes | None
    lower: bytes | None
    upper: bytes | None


def parse_label(
    value: Any, task: Task, *, classes: Sequence[str] | None = None, width: int | None = None
) -> Label:
    """A class index, or K floats, from what a client sent.

    Classification takes an index in 0…C-1 or one of ``classes``; regression a finite number or a
    list of K of them. ``width`` is C or K; None leaves the range or length unchecked. Raises
    DataError saying what would be right.
    """
    return (
        _parse_class(value, classes, width)
        if task == "classification"
        else _parse_target(value, width)
    )


def _parse_class(value: Any, classes: Sequence[str] | None, width: int | None) -> int:
    n = width if classes is None else len(classes)
    if isinstance(value, str):
        if classes is None:
            raise DataError(f"label {value!r}: this model has no class names, send the class index")
        try:
            return _positions(tuple(classes))[value]
        except KeyError:
            raise DataError(f"label {value!r} is none of the {n} classes of this model") from None
    try:
        index = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        index = -1
    if index < 0 or index >= (2**31 if n is None else n):
        last = "C-1" if n is None else str(n - 1)
        raise DataError(f"label {value!r} is no class: send an index in 0…{last} or a class name")
    return index


@lru_cache(maxsize=64)
def _positions(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(classes)}


def _parse_target(value: Any, width: int | None) -> list[float]:
    items = value if isinstance(value, list | tuple) else [value]
    target = [float(v) for v in items if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(target) != len(items) or not items or not all(map(math.isfinite, target)):
        raise DataError(f"label {value!r} is no target: send a finite number or a list of them")
    if width is not None and len(target) != width:
        raise DataError(f"label {value!r} has {len(target)} numbers, the model has {width} outputs")
    return target


def totals_of(rows: Iterable[Joined]) -> dict[tuple[str, str], Totals]:
    """The additive statistics of joined rows, by the model and version that predicted."""
    groups: dict[tuple[str, str], dict[tuple[Any, ...], list[Joined]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        # Rows whose arrays can be stacked: the same fields are there, and equally wide.
        shape = tuple(
            None if b is None else len(b) for b in (row.probs, row.set, row.mean, row.lower)
        )
        groups[row.model, row.version][row.task, row.level is None, shape].append(row)
    out: dict[tuple[str, str], Totals] = {}
    for key, parts in groups.items():
        for (task, _, _), same in parts.items():
            if task == "classification":
                out[key] = _classes(out.get(key, ClassificationTotals()), same)
            else:
                out[key] = _targets(out.get(key, RegressionTotals()), same)
    return out


def merge_totals(a: Totals, b: Totals) -> Totals:
    """The totals of both sets of rows. Raises DataError for totals of two tasks."""
    if isinstance(a, ClassificationTotals) and isinstance(b, ClassificationTotals):
        return merge(a, b)
    if isinstance(a, RegressionTotals) and isinstance(b, RegressionTotals):
        return merge(a, b)
    raise DataError("classification and regression rows under one model and version")


def _classes(totals: Totals, rows: list[Joined]) -> Totals:
    if not isinstance(totals, ClassificationTotals):
        raise DataError(f"{rows[0].model} {rows[0].version}: rows of two tasks")
    y = np.array([r.value for r in rows], dtype=np.int64)
    sets = rows[0].set is not None and rows[0].level is not None
    bits = np.unpackbits(_stack([r.set for r in rows], "u1"), axis=1) if sets else None
    return update_classification(
        totals,
        confidence=np.array([r.confidence for r in rows], dtype=np.float64),
        label=np.array([r.label for r in rows], dtype=np.int64),
        y=y,
        probs=None if rows[0].probs is None else _stack([r.probs for r in rows], "<f4"),
        covered=None if bits is None else bits[np.arange(len(y)), y].astype(bool),
        set_size=None if bits is None else bits.sum(axis=1),
        level=np.array([r.level for r in rows]) if sets else None,
    )


def _targets(totals: Totals, rows: list[Joined]) -> Totals:
    if not isinstance(totals, RegressionTotals):
        raise DataError(f"{rows[0].model} {rows[0].version}: rows of two tasks")
    bounded = rows[0].lower is not None and rows[0].level is not None
    return update_regression(
        totals,
        mean=_stack([r.mean for r in rows], "<f4"),
        std=_stack([r.std for r in rows], "<f4"),
        y=np.array([r.value for r in rows], dtype=np.float64),
        lower=_stack([r.lower for r in rows], "<f4") if bounded else None,
        upper=_stack([r.upper for r in rows], "<f4") if bounded else None,
        level=np.array([r.level for r in rows]) if bounded else None,
    )


def _stack(blobs: Sequence[bytes | None], dtype: str) -> Array:
    """N×W from N equally long blobs."""
    return np.frombuffer(b"".join(b or b"" for b in blobs), dtype=dtype).reshape(len(blobs), -1)
