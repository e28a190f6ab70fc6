"""Predictions on their way into the ledger: from the arrays of a batch to rows of a table."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from calibration.metrics.totals import bin_index
from posthoc.contract import Array, Task

MAX_STORED_CLASSES = 1000  # above it probs are not kept, nor log loss and Brier counted

_NUMBERS = ("label", "confidence", "entropy", "set_size", "ood_pvalue", "ood", "abstain")
_TENSORS = ("probs", "mean", "std", "lower", "upper", "quantiles")
KEPT = frozenset((*_NUMBERS, *_TENSORS, "set"))
BLOBS = frozenset((*_TENSORS, "set"))
_ROW_BYTES = 100  # an id

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """The bundle that predicted, as the ledger knows it. ``width``: classes or outputs.

    ``images`` says that the rows beside it are summaries of images.
    """

    model: str
    version: str
    identity: str
    task: Task
    width: int | None = None
    classes: tuple[str, ...] | None = None
    levels: tuple[str, ...] | None = None
    images: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """One served batch: N ids, and of N rows the fields that `compact` keeps.

    ``width``: classes, where the graph gives probs; ``images``: fields are a `service.images`
    summary.
    """

    model: str
    version: str
    identity: str
    ids: Sequence[str]
    fields: Mapping[str, Array]
    width: int | None
    level: str | None
    group: Array | None
    time: float
    images: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """Batches of one kind may be concatenated."""
        names = tuple(sorted(self.fields))
        same = (self.model, self.version, self.identity, self.width, self.level, self.images)
        return (*same, names, self.group is None)

    @property
    def size(self) -> int:
        """Bytes that this takes in memory, about."""
        return sum(v.nbytes for v in self.fields.values()) + _ROW_BYTES * len(self.ids)


def compact(fields: Mapping[str, Array]) -> tuple[dict[str, Array], int | None]:
    """What the ledger keeps of N rows' fields, and the number of classes where probs are there.

    ``set`` becomes N×⌈C/8⌉ bytes (numpy.packbits), probs of too many classes go, and nothing
    keeps a larger array alive. Raises TypeError or ValueError for fields that are no prediction.
    """
    kept = {name: np.asarray(v) for name, v in fields.items() if name in KEPT and v is not None}
    probs = kept.get("probs")
    if probs is not None and probs.ndim < 2:
        raise ValueError(f"probs of shape {probs.shape} are no table of rows and classes")
    width = None if probs is None else probs.shape[1]
    if width is not None and width > MAX_STORED_CLASSES:
        del kept["probs"]
    if "set" in kept:
        kept["set"] = np.packbits(kept["set"].astype(bool, copy=False), axis=1)
    return {name: v if v.base is None else v.copy() for name, v in kept.items()}, width


def rows_of(served: Iterable[Served]) -> list[tuple[Source, list[Row]]]:
    """Rows of the table ``predictions`` (or ``images``) by bundle; neighbours of one kind are
    converted together.

    Raises KeyError, ValueError or DataError for fields that are no prediction.
    """
    out: list[tuple[Source, list[Row]]] = []
    for _, same in groupby(served, key=lambda b: b.kind):
        batches = list(same)
        out.append(_images(batches) if batches[0].images else _rows(batches))
    return out


def _images(batches: list[Served]) -> tuple[Source, list[Row]]:
    first = batches[0]
    names = ("model", "level", "id", "time", *first.fields)
    columns = (np.concatenate([b.fields[k] for b in batches]).tolist() for k in first.fields)
    ids = [i for b in batches for i in b.ids]
    times = [t for b in batches for t in [b.time] * len(b.ids)]
    rows = [
        dict(zip(names, (first.model, first.level, *row), strict=True))
        for row in zip(ids, times, *columns, strict=True)
    ]
    task: Task = "classification" if "confidence" in first.fields else "regression"
    return Source(first.model, first.version, first.identity, task, images=True), rows


def _rows(batches: list[Served]) -> tuple[Source, list[Row]]:
    first = batches[0]
    fields = {k: np.concatenate([np.asarray(b.fields[k]) for b in batches]) for k in first.fields}
    ids = [i for b in batches for i in b.ids]
    n = len(ids)
    task: Task = "regression" if "mean" in fields else "classification"
    columns: dict[str, Sequence[Any]] = {
        "model": [first.model] * n,
        "id": ids,
        "level": [first.level] * n,
        "time": [t for b in batches for t in [b.time] * len(b.ids)],
    }
    if first.group is not None:
        columns["grp"] = np.concatenate([np.asarray(b.group) for b in batches]).tolist()
    for name in _NUMBERS:
        if name in fields:
            columns[name] = fields[name].tolist()
    if task == "classification":
        columns["bin"] = bin_index(fields["confidence"]).tolist()
        width = first.width
        if "set" in fields:
            columns["set"] = _blobs(fields["set"])
    else:
        fields["mean"] = fields["mean"].reshape(n, -1)
        width = fields["mean"].shape[1]
    for name in _TENSORS:
        if name in fields:
            columns[name] = _blobs(fields[name].astype("<f4").reshape(n, -1))
    names = tuple(columns)
    rows = [dict(zip(names, r, strict=True)) for r in zip(*columns.values(), strict=True)]
    return Source(first.model, first.version, first.identity, task, width), rows


def _blobs(matrix: Array) -> list[bytes]:
    """The bytes of each row of an N×W matrix."""
    data, width = matrix.tobytes(), matrix.shape[1] * matrix.itemsize
    return (
        [data[i : i + width] for i in range(0, len(data), width)] if width else [b""] * len(matrix)
    )


def to_json(rows: Sequence[Row]) -> list[Row]:
    """Rows with their blobs as base64 text."""
    return [
        {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in r.items()}
        for r in rows
    ]


def from_json(rows: Sequence[Row]) -> list[Row]:
    """The inverse of ``to_json``."""
    return [
        # The mean std of an image is a number under the name of a blob.
        {k: base64.b64decode(v) if k in BLOBS and isinstance(v, str) else v for k, v in r.items()}
        for r in rows
    ]
