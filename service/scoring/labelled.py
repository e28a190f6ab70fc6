"""Labels beside scored rows: which of them may be measured, and what those add up to.

The sums are those of `calibration.metrics.totals`, as everywhere; each fragment's go into the
footer of its output. A row that the bundle's fit saw is never measured: its coverage would say
nothing of new rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.bundle import Manifest
from calibration.metrics.proper import brier_score, gaussian_crps, gaussian_log_loss
from calibration.metrics.totals import (
    ClassificationTotals,
    LevelTotals,
    RegressionTotals,
    level_name,
    merge,
    update_classification,
    update_regression,
)
from calibration.predictor import Predictor
from calibration.unseen import Unseen
from posthoc.columns import is_text, texts
from posthoc.contract import F64, I64, Array, DataError, Task
from posthoc.data import Rows, TableMapping, to_rows
from posthoc.folds import log_loss_of_probs
from service.labels import Totals
from service.scoring.answers import MAY_BE_INFINITE

FIELDS: Mapping[Task, tuple[str, ...]] = {
    "classification": ("label", "probs", "confidence", "set"),
    "regression": ("mean", "std", "lower", "upper"),
}
PIT_COUNTS = (20, 100)  # bins, and the levels of the calibration error
_AT_ONCE = 4096  # rows, so that float64 copies of many classes stay small
UNMEASURED = ("unlabelled", "wrong", "seen", "keyless", "refused")


@dataclass(frozen=True, slots=True)
class Labels:
    """How labels are read (``columns`` of a table, and that of split keys), and which rows the fit
    has not seen. ``width`` is the number of classes or of outputs."""

    columns: tuple[str, ...]
    split_by: str | None
    task: Task
    classes: tuple[str, ...] | None
    width: int
    level: str
    unseen: Unseen


@dataclass(frozen=True, slots=True)
class Labelled:
    """Sums over the rows that were measured, and counts of those that were not.

    ``squares`` are sums of squared per-row figures (nll and brier; squared_error, mae, crps and
    nll), for standard errors; ``pit`` counts values of a regression (`PIT_COUNTS`). Rows without a
    prediction count nowhere; of the others ``unlabelled`` had no label (null or NaN), ``wrong`` one
    that is no class or target, ``seen`` were used by the fit, ``keyless`` had no split key, so that
    nobody knows, and ``refused`` no finite answer in a field that is not written.
    """

    totals: Totals
    squares: Mapping[str, float]
    pit: tuple[I64, I64] | None = None
    unlabelled: int = 0
    wrong: int = 0
    seen: int = 0
    keyless: int = 0
    refused: int = 0

    @property
    def n(self) -> int:
        """Rows that were measured."""
        return self.totals.n


def label_columns(manifest: Manifest, labels: Sequence[str]) -> tuple[str, ...]:
    """Columns that are read beside the inputs to measure rows with ``labels``: these, and that of
    split keys, without which nobody can tell which rows the fit saw; none without labels.

    Raises DataError for a dense bundle, whose labels are maps.
    """
    if not labels:
        return ()
    if manifest.dense is not None:
        raise DataError(
            "label maps are not measured while scoring; leave --labels out and use hedged evaluate"
        )
    split_by = manifest.mapping.split_by
    return tuple(dict.fromkeys((*labels, *(() if split_by is None else (split_by,)))))


def labels_of(
    predictor: Predictor, columns: Sequence[str], alpha: float | None, schema: pa.Schema
) -> Labels:
    """How labels in ``columns`` of tables are read, whose ``schema`` has the `label_columns`.

    Raises DataError for columns that cannot be labels of this bundle.
    """
    manifest = predictor.manifest
    name = "probs" if manifest.task == "classification" else "mean"
    labels = Labels(
        columns=tuple(columns),
        split_by=manifest.mapping.split_by,
        task=manifest.task,
        classes=manifest.classes,
        width=next(s.shape[1] for s in manifest.outputs if s.name == name),
        level=level_name(manifest.alphas[0] if alpha is None else alpha),
        unseen=Unseen(predictor.bundle),
    )
    if labels.task == "regression" and 1 < len(columns) != labels.width:
        raise DataError(f"--labels names {len(columns)} columns for {labels.width} outputs")
    for column in columns:
        kind = schema.field(column).type
        if labels.task == "classification" and pa.types.is_nested(kind):
            raise DataError(f"column {column!r} holds {kind}, and a label is one class")
    kept = pa.schema([schema.field(c) for c in label_columns(manifest, columns)])
    _read(labels, pa.RecordBatch.from_pylist([{}], schema=kept))  # refuses other wrong types
    return labels


def nothing(labels: Labels) -> Labelled:
    """The sums of no rows."""
    if labels.task == "classification":
        return Labelled(ClassificationTotals(), dict.fromkeys(("nll", "brier"), 0.0))
    zero = dict.fromkeys(("squared_error", "mae", "crps", "nll"), 0.0)
    bins, levels = PIT_COUNTS
    return Labelled(
        RegressionTotals(), zero, (np.zeros(bins, np.int64), np.zeros(levels, np.int64))
    )


def measure(
    labels: Labels,
    found: Labelled,
    hashes: Array,
    beside: pa.RecordBatch,
    fields: Mapping[str, Array],
) -> Labelled:
    """The sums with N answered rows more: their content ``hashes``, the `label_columns`
    ``beside`` them, and their prediction ``fields``."""
    missing = np.zeros(len(hashes), bool)
    for name in labels.columns:
        missing |= np.asarray(pc.is_null(_readable(labels, beside.column(name)), nan_is_null=True))
    keyless = np.zeros(len(hashes), bool)
    if labels.split_by is not None:
        keyless = ~missing & np.asarray(pc.is_null(beside.column(labels.split_by)))
    at = np.flatnonzero(~missing & ~keyless)
    found = replace(
        found,
        unlabelled=found.unlabelled + int(missing.sum()),
        keyless=found.keyless + int(keyless.sum()),
    )
    if not len(at):
        return found
    rows = _read(labels, beside.take(pa.array(at)))
    keys = hashes[at] if labels.split_by is None else rows.split_keys
    keep = labels.unseen.usable(replace(rows, content_hashes=hashes[at], split_keys=keys), True)
    fields = {name: fields[name][at] for name in FIELDS[labels.task] if name in fields}
    finite = keep & _finite(fields, len(at))
    found = replace(
        found,
        wrong=found.wrong + len(rows.bad),
        seen=found.seen + int((~keep).sum()) - len(rows.bad),
        refused=found.refused + int((keep & ~finite).sum()),
    )
    measured = np.flatnonzero(finite)
    for start in range(0, len(measured), _AT_ONCE):
        part = measured[start : start + _AT_ONCE]
        assert rows.y is not None
        found = _add(labels, found, rows.y[part], {k: v[part] for k, v in fields.items()})
    return found


def merged(a: Labelled, b: Labelled) -> Labelled:
    """The sums of both."""
    assert type(a.totals) is type(b.totals)
    return Labelled(
        merge(a.totals, b.totals),  # type: ignore[type-var]  # both of one task
        {k: v + b.squares[k] for k, v in a.squares.items()},
        None if a.pit is None or b.pit is None else (a.pit[0] + b.pit[0], a.pit[1] + b.pit[1]),
        **{name: getattr(a, name) + getattr(b, name) for name in UNMEASURED},
    )


def to_json(found: Labelled) -> dict[str, Any]:
    """Plain JSON values, from which `from_json` makes the same sums to the last bit."""
    kept: dict[str, Any] = {name: getattr(found, name) for name in UNMEASURED}
    kept["squares"] = {k: _kept(v) for k, v in found.squares.items()}
    if found.pit is not None:
        kept["pit"] = [counts.tolist() for counts in found.pit]
    totals = {f.name: getattr(found.totals, f.name) for f in dataclass_fields(found.totals)}
    levels = totals.pop("levels")
    kept["levels"] = {k: [v.labeled, v.covered, _kept(v.size_sum)] for k, v in levels.items()}
    kept["totals"] = {k: _kept(v) for k, v in totals.items()}
    return kept


def from_json(labels: Labels, kept: Mapping[str, Any]) -> Labelled:
    """What `to_json` was given. Raises KeyError, TypeError or ValueError for anything else."""
    empty = nothing(labels)
    levels = {k: LevelTotals(n, hit, float(size)) for k, (n, hit, size) in kept["levels"].items()}
    totals: dict[str, Any] = {}
    for f in dataclass_fields(empty.totals):
        if f.name != "levels":
            like = getattr(empty.totals, f.name)
            value = kept["totals"][f.name]
            made = np.array(value, like.dtype) if isinstance(like, np.ndarray) else value
            if np.shape(made) != np.shape(like):
                raise ValueError(f"{f.name} has another length")
            totals[f.name] = float(made) if isinstance(like, float) else made
    pit = None
    if empty.pit is not None:
        bins, below = (np.array(counts, np.int64) for counts in kept["pit"])
        pit = bins, below
    return Labelled(
        type(empty.totals)(**totals, levels=levels),
        {k: float(kept["squares"][k]) for k in empty.squares},
        pit,
        **{name: int(kept[name]) for name in UNMEASURED},
    )


def _add(labels: Labels, found: Labelled, y: Array, fields: Mapping[str, Array]) -> Labelled:
    if isinstance(found.totals, ClassificationTotals):
        hit = fields["set"][np.arange(len(y)), y] if "set" in fields else None
        totals: Totals = update_classification(
            found.totals,
            # A float32 softmax may sum to a hair above 1.
            confidence=np.minimum(np.asarray(fields["confidence"], np.float64), 1.0),
            label=fields["label"],
            y=y,
            probs=fields["probs"],
            covered=hit,
            level=None if hit is None else labels.level,
            set_size=None if hit is None else fields["set"].sum(axis=1),
        )
        losses = {
            "nll": log_loss_of_probs(fields["probs"], y),
            "brier": brier_score(fields["probs"], y),
        }
        return replace(found, totals=totals, squares=_squared(found.squares, losses))
    mean, std = (np.asarray(fields[k], np.float64) for k in ("mean", "std"))
    error = y - mean
    with np.errstate(over="ignore"):  # a target like 1e200 makes sums infinite, and is no fault
        totals = update_regression(
            found.totals,
            mean=mean,
            std=std,
            y=y,
            lower=fields.get("lower"),
            upper=fields.get("upper"),
            level=labels.level if "lower" in fields else None,
        )
        losses = {
            "squared_error": (error**2).mean(axis=1),
            "mae": np.abs(error).mean(axis=1),
            "crps": gaussian_crps(error, std).mean(axis=1),
            "nll": gaussian_log_loss(error, std).mean(axis=1),
        }
        squares = _squared(found.squares, losses)
    return replace(found, totals=totals, squares=squares, pit=_pit(found, error, std))


def _pit(found: Labelled, error: F64, std: F64) -> tuple[I64, I64]:
    from calibration.metrics.regression import PitTotals, gaussian_pit, pit_totals  # imports scipy

    assert found.pit is not None
    pit = gaussian_pit(np.zeros_like(error), std, error)
    totals = pit_totals.update(PitTotals(*found.pit), pit)
    return totals.count, totals.below


def _squared(before: Mapping[str, float], losses: Mapping[str, F64]) -> dict[str, float]:
    return {name: total + float((losses[name] ** 2).sum()) for name, total in before.items()}


def _finite(fields: Mapping[str, Array], n: int) -> Array:
    """Rows whose fields are finite, or at least numbers where a bound may honestly be infinite."""
    finite = np.ones(n, bool)
    for name, values in fields.items():
        if values.dtype.kind == "f":
            good = ~np.isnan(values) if name in MAY_BE_INFINITE else np.isfinite(values)
            finite &= good.reshape(n, -1).all(axis=1)
    return finite


def _read(labels: Labels, beside: pa.RecordBatch) -> Rows:
    """Labels and split keys, as `hedged evaluate` reads them."""
    columns = [
        _readable(labels, column) if name in labels.columns else column
        for name, column in zip(beside.schema.names, beside.columns, strict=True)
    ]
    return to_rows(
        pa.RecordBatch.from_arrays(columns, names=beside.schema.names),
        TableMapping(inputs={}, target=labels.columns, split_by=labels.split_by),
        (),
        task=labels.task,
        classes=labels.classes,
        need_target=True,
        n_classes=labels.width,
        hashed=False,
    )


def _readable(labels: Labels, column: pa.Array) -> pa.Array:
    """A column of labels, with numbers in place of text (as CSV has them) where no names are
    known; text that is no number is then infinite, which is no label."""
    if pa.types.is_null(column.type):
        return column.cast(pa.string() if labels.classes is not None else pa.float64())
    if not is_text(column.type) or (labels.task == "classification" and labels.classes is not None):
        return column
    return pa.array([_number(text) for text in texts(column)], pa.float64())


def _number(text: str | None) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return math.inf


def _kept(value: Any) -> Any:
    """Arrays as lists, infinities as text: JSON has none."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
