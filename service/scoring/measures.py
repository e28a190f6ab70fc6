"""What is measured beside the rows of a run, with labels and without, fragment by fragment.

A fragment's measurements are one line of JSON, in its `Outcome` as in the footer of its output, so
a fragment of an earlier process counts as one of this; merged in the listing's order they give the
same figures, to the last bit, on every engine and after any number of kills.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import pyarrow as pa

from calibration.bundle import Manifest
from calibration.predictor import Predictor
from posthoc.contract import Array
from service.scoring import drift, labelled
from service.scoring.drift import Reference, Seen
from service.scoring.evaluation import headlines, report
from service.scoring.labelled import FIELDS, Labelled, Labels

EVALUATION = "_evaluation.json"
DRIFT = "_drift.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measures:
    """What is measured: None of what is not."""

    labels: Labels | None = None
    reference: Reference | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Prediction fields that are needed, written or not."""
        return () if self.labels is None else FIELDS[self.labels.task]

    def start(self) -> Measured:
        """The measurements of no rows."""
        return Measured(
            None if self.labels is None else labelled.nothing(self.labels),
            None if self.reference is None else drift.nothing(self.reference),
        )

    def add(
        self,
        found: Measured,
        hashes: Array,
        beside: pa.RecordBatch,
        fields: Mapping[str, Array],
    ) -> Measured:
        """The measurements with N answered rows more: their content ``hashes``, the columns
        ``beside`` and the prediction ``fields``."""
        labels, seen = found.labels, found.seen
        if self.labels is not None and labels is not None:
            labels = labelled.measure(self.labels, labels, hashes, beside, fields)
        if self.reference is not None and seen is not None:
            seen = drift.look(self.reference, seen, fields, len(hashes))
        return Measured(labels, seen)

    def to_text(self, found: Measured) -> str:
        """One line of JSON, from which `from_text` makes the same measurements to the last bit."""
        kept = {}
        if found.labels is not None:
            kept["labels"] = labelled.to_json(found.labels)
        if found.seen is not None:
            kept["drift"] = drift.to_json(found.seen)
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def from_text(self, text: str) -> Measured | None:
        """What `to_text` was given; None for anything else."""
        try:
            kept = json.loads(text)
            return Measured(
                None if self.labels is None else labelled.from_json(self.labels, kept["labels"]),
                None if self.reference is None else drift.from_json(self.reference, kept["drift"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of some rows."""

    labels: Labelled | None = None
    seen: Seen | None = None


@dataclass(frozen=True, slots=True)
class Reports:
    """What a run tells of its rows: ``files`` by name, which are committed before the run counts as
    done, ``lines`` for a reader, and both reports as JSON values."""

    evaluation: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None
    lines: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, bytes]:
        """The bytes of each report that there is, by its name in the output."""
        told = {EVALUATION: self.evaluation, DRIFT: self.drift}
        return {
            name: (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
            for name, report in told.items()
            if report is not None
        }


def measures_of(
    predictor: Predictor,
    fields: Sequence[str],
    alpha: float | None,
    labels: Sequence[str],
    schema: pa.Schema,
) -> Measures:
    """What is measured in a run that writes ``fields``, with labels in the columns ``labels`` of
    tables of a ``schema``. Raises DataError as `labelled.labels_of`.

    Of maps nothing is: their reference is of single pixels.
    """
    found = None
    if labels:
        found = labelled.labels_of(predictor, labels, alpha, schema)
    if predictor.manifest.dense is not None:
        return Measures()
    return Measures(found, drift.reference_of(predictor.bundle, fields))


def reports_of(
    measures: Measures, manifest: Manifest, identity: Mapping[str, str], texts: Iterable[str]
) -> Reports:
    """The reports of a run from the ``texts`` of its fragments, in the listing's order;
    ``identity`` (run and bundle) is written into both."""
    found = [m for m in map(measures.from_text, texts) if m is not None]
    labels = _merged(labelled.merged, [m.labels for m in found if m.labels is not None])
    seen = _merged(drift.merged, [m.seen for m in found if m.seen is not None])
    evaluation = drifted = None
    lines: tuple[str, ...] = ()
    if measures.labels is not None:
        labels = labelled.nothing(measures.labels) if labels is None else labels
        evaluation = {**identity, **report(measures.labels, labels, seen, manifest)}
        lines += headlines(evaluation)
    if measures.reference is not None:
        seen = drift.nothing(measures.reference) if seen is None else seen
        drifted = {**identity, **drift.report(measures.reference, seen, manifest)}
        lines += drift.lines(drifted)
    return Reports(evaluation, drifted, lines)


def _merged(merge: Callable[[T, T], T], parts: Sequence[T]) -> T | None:
    return reduce(merge, parts) if parts else None
