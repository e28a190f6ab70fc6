"""``_evaluation.json``: what the labels of a run say, with the intervals that are right for each.

Figures are named as `hedged evaluate` names them, and are its figures for the same rows. Its graph
ran them in other batches, which moves a probability in its seventh digit, and so, rarely, a row
across the edge of a bin or of a set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from calibration.bundle import Manifest
from calibration.drift.label_free import STRATIFIED_ASSUMES, measured_bias, post_stratified
from calibration.metrics.binomial import share_interval
from calibration.metrics.calibration_error import debiased_ece
from calibration.metrics.totals import (
    BIN_LABELS,
    ClassificationTotals,
    LevelTotals,
    RegressionTotals,
    level_name,
)
from service.scoring.drift import Seen
from service.scoring.labelled import UNMEASURED, Labelled, Labels

_Z = 1.959963984540054  # of a two-sided 95 % interval
_SIMULATED = 1000
_BAND_ROWS = 1_000_000
_GROUPED = (
    "rows share a split key and are no independent evidence: no interval and no band is shown; "
    "hedged evaluate resamples whole items"
)
_MEANS = {"nll": "log_loss_sum", "brier": "brier_sum", "mae": "absolute_error_sum"}


def report(
    labels: Labels, found: Labelled, seen: Seen | None, manifest: Manifest
) -> dict[str, Any]:
    """The figures of the measured rows, and how many rows were not measured and why.

    A figure has ``value``, ``low``, ``high`` and the ``range`` that these are: a 95 % ``interval``
    of a share (Clopper-Pearson) or of a mean (normal), or where a ``perfect``ly calibrated model's
    would lie. ECE has no interval that is right, only such a range. A level's band is where luck
    leaves the coverage of a valid bundle with probability 0.99 (`coverage_band`). With ``seen``,
    the rows served by confidence bin, and rows without a label, figures are given once more as if
    labels had come in the shares that were served.
    """
    grouped = labels.split_by is not None
    rows = {"measured": found.n, **{name: getattr(found, name) for name in UNMEASURED}}
    told: dict[str, Any] = {
        "task": labels.task,
        "labels": list(labels.columns),
        "rows": rows,
        "metrics": _metrics(found, grouped) if found.n else {},
        "levels": _levels(found, grouped, manifest) if found.n else {},
        "notes": _notes(found, grouped, manifest),
    }
    totals = found.totals
    if isinstance(totals, ClassificationTotals):
        told["bins"] = _bins(totals)
        told["stratified"] = None
        if found.n and found.unlabelled and seen is not None and seen.count.any():
            told["stratified"] = {
                **asdict(post_stratified(seen.count, totals)),
                "bias_of_expected_accuracy": asdict(measured_bias(seen.count, totals)),
                "assumes": STRATIFIED_ASSUMES,
            }
    return told


def headlines(told: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the summary is told of a `report`."""
    rows, metrics = told["rows"], told["metrics"]
    apart = ", ".join(f"{rows[name]:,} {why}" for name, why in _WHY.items() if rows[name])
    lines = [f"labels: {rows['measured']:,} rows measured" + (f"; not: {apart}" if apart else "")]
    shown = ("accuracy", "debiased_ece", "nll", "brier", "rmse", "crps", "pce")
    lines += [_text(name, metrics[name]) for name in shown if name in metrics]
    for level, figure in told["levels"].items():
        band = ""
        if figure["band_low"] is not None:
            band = f", luck allows {figure['band_low']:.4f} to {figure['band_high']:.4f}"
        size = figure["mean_size"]
        lines.append(
            _text(f"level {level}: coverage", figure["coverage"])
            + band
            + ("" if size is None else f", mean size {size:.4g}")
        )
    return tuple(lines)


_WHY = {
    "unlabelled": "without a label",
    "wrong": "with a label that is none",
    "seen": "that the fit saw",
    "keyless": "without a split key",
    "refused": "without a finite answer",
}


def _text(name: str, figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return f"{name} infinite"
    if figure["low"] is None:
        return f"{name} {figure['value']:.4f}"
    of = "" if figure["range"] == "interval" else "a calibrated model: "
    return f"{name} {figure['value']:.4f} ({of}{figure['low']:.4f} to {figure['high']:.4f})"


def _metrics(found: Labelled, grouped: bool) -> dict[str, dict[str, Any]]:
    totals, n = found.totals, found.n
    if isinstance(totals, ClassificationTotals):
        return {
            "accuracy": _share(int(totals.correct.sum()), n, grouped),
            **{name: _mean(found, name, grouped) for name in ("nll", "brier")},
            **_calibration(totals, grouped),
        }
    return {
        "rmse": _root(_of(totals.squared_error_sum, found.squares["squared_error"], n, grouped)),
        **{name: _mean(found, name, grouped) for name in ("mae", "crps", "nll")},
        "pce": _pce(found, grouped),
    }


def _mean(found: Labelled, name: str, grouped: bool) -> dict[str, Any]:
    total = getattr(found.totals, _MEANS.get(name, f"{name}_sum"))
    return _of(total, found.squares[name], found.n, grouped)


def _of(total: float, squares: float, n: int, grouped: bool) -> dict[str, Any]:
    """A mean of n rows with its normal interval."""
    mean = total / n
    if n < 2 or grouped:
        return _figure(mean)
    half = _Z * math.sqrt(max(squares / n - mean * mean, 0.0) / (n - 1))
    return _figure(mean, (mean - half, mean + half))


def _root(square: dict[str, Any]) -> dict[str, Any]:
    if square["value"] is None:
        return square
    if square["low"] is None:
        return _figure(math.sqrt(square["value"]))
    ends = tuple(math.sqrt(max(square[end], 0.0)) for end in ("low", "high"))
    return _figure(math.sqrt(square["value"]), (ends[0], ends[1]))


def _share(hits: int, n: int, grouped: bool) -> dict[str, Any]:
    return _figure(hits / n, None if grouped else share_interval(hits, n))


def _calibration(totals: ClassificationTotals, grouped: bool) -> dict[str, dict[str, Any]]:
    """ECE and debiased ECE beside a perfect model's, whose outcomes are drawn bin by bin: binomial
    with the bin's mean confidence, which scatters hardly more than with each row's own."""
    found = {"ece": totals.ece, "debiased_ece": debiased_ece(totals)}
    if grouped:
        return {name: _figure(value) for name, value in found.items()}
    filled = np.maximum(totals.count, 1)
    drawn = np.random.default_rng(0).binomial(
        totals.count, np.clip(totals.confidence_sum / filled, 0.0, 1.0), (_SIMULATED, len(filled))
    )
    perfect = [replace(totals, correct=correct) for correct in drawn]
    ends = {"ece": [p.ece for p in perfect], "debiased_ece": [debiased_ece(p) for p in perfect]}
    return {
        name: _figure(value, tuple(np.quantile(ends[name], [0.025, 0.975]).tolist()), "perfect")
        for name, value in found.items()
    }


def _pce(found: Labelled, grouped: bool) -> dict[str, Any]:
    from calibration.metrics.regression import PitTotals, perfect_pce  # imports scipy

    assert found.pit is not None
    totals = PitTotals(*found.pit)
    if grouped:
        return _figure(totals.pce)
    return _figure(totals.pce, perfect_pce(totals.n), "perfect")


def _levels(found: Labelled, grouped: bool, manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "coverage": _share(level.covered, level.labeled, grouped),
            **_band(name, level, grouped, manifest),
            "mean_size": level.mean_size if math.isfinite(level.mean_size) else None,
        }
        for name, level in found.totals.levels.items()
    }


def _band(name: str, level: LevelTotals, grouped: bool, manifest: Manifest) -> dict[str, Any]:
    """The band of luck, where one law holds for all rows."""
    conformal = manifest.conformal
    low = high = None
    if not grouped and conformal.given is None and conformal.shift is None:
        from calibration.metrics.coverage import coverage_band  # imports scipy.stats

        # Of more rows the band is hardly narrower and takes long to sum.
        n = min(level.labeled, _BAND_ROWS)
        low, high = coverage_band(conformal.guarantees[0].n, n, 1 - float(name))
    return {"band_low": low, "band_high": high}


def _bins(totals: ClassificationTotals) -> list[dict[str, Any]]:
    return [
        {
            "bin": label,
            "labelled": int(totals.count[i]),
            "correct": int(totals.correct[i]),
            "confidence_sum": float(totals.confidence_sum[i]),
        }
        for i, label in enumerate(BIN_LABELS)
    ]


def _notes(found: Labelled, grouped: bool, manifest: Manifest) -> list[str]:
    notes = []
    if grouped:
        notes.append(_GROUPED)
    if not found.n:
        notes.append("no row is left to be measured")
    if found.unlabelled and isinstance(found.totals, RegressionTotals):
        notes.append("some rows have no label: the figures are of those that have one")
    if manifest.conformal.shift is not None:
        notes.append("conformal rows were weighted for a shift: coverage is promised of such rows")
    levels = [g.alpha for g in manifest.conformal.guarantees]
    for name in found.totals.levels:
        if name not in map(level_name, levels):
            notes.append(f"level {name} is not one that the bundle was fitted for")
    return notes


def _figure(
    value: float, ends: tuple[float, ...] | None = None, kind: str = "interval"
) -> dict[str, Any]:
    """null for what is not finite: of a target like 1e200 the square is not."""
    low, high = (None, None) if ends is None else ends
    found = {"value": value, "low": low, "high": high}
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}
    return {**finite, "range": kind}
