"""What a bundle promises of coverage and accuracy, each watched from the first label on.

Per level the null is that coverage is still what the bundle's conformal rows leave at least, less
a tolerance; of a classifier the same of accuracy and its test rows
(`calibration.drift.risk_monitor`).

The error of each monitor is its own: it ever alarms falsely with probability ``ERROR`` at most,
half of it for the rows of the bundle, half for the labels. Of a bundle with L levels any of the
L + 1 monitors does with probability ``(L + 1) * ERROR`` at most (0.15 for two levels); of M such
bundles at most ``M * (L + 1) * ERROR`` false alarms are expected, over all time. Levels share rows
and labels, and the tolerance is on top, so there are far fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calibration.bundle import Guarantee, Manifest
from calibration.drift import risk_monitor
from calibration.drift.risk_monitor import RiskMonitor
from calibration.metrics.totals import ClassificationTotals, level_name
from posthoc.contract import DataError
from service.labels import Totals

ERROR = 0.05  # of each monitor, ever


@dataclass(frozen=True, slots=True)
class Promises:
    """The monitors of one bundle, of that ``identity``: of coverage by level name, and of accuracy.
    ``conformal_rows`` by level name are those that its thresholds stand on."""

    identity: str
    levels: Mapping[str, RiskMonitor] = field(default_factory=dict)
    accuracy: RiskMonitor | None = None
    conformal_rows: Mapping[str, int] = field(default_factory=dict)


def promises_of(manifest: Manifest, identity: str) -> Promises:
    """Monitors that have seen no label.

    A level has one where the coverage of the bundle is a draw of Beta(k, n+1-k), or everything is
    covered. Not with thresholds of their own for classes, clusters or groups, whose coverage
    depends on how many rows of each there are; not with weights for a shift; and not of maps, whose
    labels the ledger does not take. Accuracy has one where it was measured on independent test rows
    that are to be like those served: not with a shift, and not where rows share a split key.
    """
    conformal = manifest.conformal
    if manifest.dense is not None or conformal.shift is not None:
        return Promises(identity)
    lawful = [g for g in conformal.guarantees if conformal.given is None and g.kind == "coverage"]
    return Promises(
        identity,
        {level_name(g.alpha): _level(g) for g in lawful},
        _accuracy(manifest),
        {level_name(g.alpha): g.n for g in lawful},
    )


def _level(of: Guarantee) -> RiskMonitor:
    return risk_monitor.watch_level(of.alpha, of.n, error=ERROR)


def _accuracy(manifest: Manifest) -> RiskMonitor | None:
    """The test rows that were right are their share times their number, a whole one."""
    found = manifest.evaluation
    rows, share = found.get("rows"), found.get("hedged", {}).get("accuracy")
    if manifest.splits.by is not None or not rows or share is None:
        return None
    hits = round(share * rows)
    if abs(share * rows - hits) > 1e-6 * rows:  # a mean of something else
        return None
    return risk_monitor.watch_share(hits, int(rows), error=ERROR)


def with_labels(promises: Promises, totals: Totals) -> Promises:
    """The promises after more labels, given by their sums. Levels that are not the bundle's own
    count for none."""
    levels = dict(promises.levels)
    for name, sums in totals.levels.items():
        if name in levels:
            levels[name] = risk_monitor.update(levels[name], sums.labeled, sums.covered)
    accuracy = promises.accuracy
    if accuracy is not None and isinstance(totals, ClassificationTotals):
        accuracy = risk_monitor.update(accuracy, totals.n, int(totals.correct.sum()))
    return Promises(promises.identity, levels, accuracy, promises.conformal_rows)


def with_coverage(promises: Promises, known: Mapping[str, RiskMonitor]) -> Promises:
    """The promises after the labels that other monitors of the same bundle, by level name, counted.
    Evidence depends on counts alone, so it is what it would have been; only an alarm that came and
    went before is lost. Of accuracy nothing was counted."""
    levels = {
        name: risk_monitor.update(one, known[name].n, known[name].covered) if name in known else one
        for name, one in promises.levels.items()
    }
    return Promises(promises.identity, levels, promises.accuracy, promises.conformal_rows)


def to_json(promises: Promises) -> dict[str, Any]:
    """Plain JSON values, from which ``from_json`` makes equal promises."""
    accuracy = promises.accuracy
    return {
        "identity": promises.identity,
        "levels": {name: risk_monitor.to_json(one) for name, one in promises.levels.items()},
        "accuracy": None if accuracy is None else risk_monitor.to_json(accuracy),
        "conformal_rows": dict(promises.conformal_rows),
    }


def from_json(saved: Mapping[str, Any]) -> Promises:
    """The promises that were saved. Raises DataError for anything else."""
    try:
        accuracy = saved["accuracy"]
        return Promises(
            saved["identity"],
            {name: risk_monitor.from_json(text) for name, text in saved["levels"].items()},
            None if accuracy is None else risk_monitor.from_json(accuracy),
            dict(saved["conformal_rows"]),
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(f"these are no saved promises ({e!r})") from e
