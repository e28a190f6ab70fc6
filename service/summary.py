"""Calibration as the ledger knows it, as plain JSON values. No number is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from calibration.drift.label_free import measured_bias, post_stratified
from calibration.metrics.calibration_error import debiased_ece
from calibration.metrics.totals import BIN_LABELS, ClassificationTotals, RegressionTotals
from posthoc.contract import Task
from service.labels import Totals

Key = tuple[str, str, Task]
Served = Mapping[Key, Mapping[int | None, tuple[int, float]]]


def summary_of(
    served: Served,
    totals: Mapping[tuple[str, str], Totals],
    feedback: Mapping[str, Mapping[str, int]],
    since: float | None,
    images: Mapping[Key, tuple[int, Mapping[str, float]]],
    oldest: Mapping[Key, float],
) -> dict[str, Any]:
    """The answer of ``GET /v1/calibration``.

    ``models`` has one object per model and version that predicted: ``oldest`` (seconds since the
    epoch of the oldest prediction that is kept and counted here), ``served``, ``labelled``,
    ``label_coverage``, ``coverage`` by level, and for classification ``accuracy``, ``ece``,
    ``debiased_ece``, ``ece_noise_floor`` (below it an ``ece`` may be chance, see `noise_floor`),
    ``log_loss``, ``brier``, ``expected_accuracy`` (mean confidence of all served rows, which
    needs no label) with its measured ``expected_accuracy_bias`` on labelled rows (expected less
    observed, its standard error, and the standard deviation that a calibrated model's has:
    `calibration.drift.label_free.Bias`), ``bins``, and ``stratified_``… figures, in which each
    confidence bin counts as it was served: right only if labels are missing at random given
    confidence, and of the share of served rows whose bin has labels
    (`calibration.drift.label_free`); for regression ``rmse``, ``mae``, ``crps``, ``log_loss``.
    Of a dense model ``served`` counts images, ``expected_accuracy`` is of pixels, and ``images``
    has means over images in place of what needs labels: ``confidence``, ``entropy``,
    ``set_size``, ``std``, and the shares of pixels ``ood`` and ``abstain``.
    ``feedback`` counts labels by model and result; null stands for "no rows".
    """
    models = []
    for (model, version, task), bins in served.items():
        found = totals.get((model, version))
        head: dict[str, Any] = {"model": model, "version": version, "task": task}
        head["oldest"] = oldest.get((model, version, task))
        if not bins and (model, version, task) in images:
            models.append(head | _images(*images[model, version, task]))
        elif task == "classification":
            known = found if isinstance(found, ClassificationTotals) else ClassificationTotals()
            models.append(head | _counts(bins, known.n) | _classification(bins, known))
        else:
            values = found if isinstance(found, RegressionTotals) else RegressionTotals()
            models.append(head | _counts(bins, values.n) | _regression(values))
    return {"since": since, "models": models, "feedback": {m: dict(c) for m, c in feedback.items()}}


def noise_floor(totals: ClassificationTotals) -> float:
    """The ECE that a perfectly calibrated model would hardly exceed on as many labels.

    With n labels of mean confidence c in a bin, correct - confidence is about normal with
    variance n c (1 - c); its absolute value has mean sqrt(2/pi) and variance 1 - 2/pi in units of
    that. The floor is the mean of the sum over bins plus three standard deviations, over all
    labels, as the alert on the counters has it. nan for no labels.
    """
    if not totals.n:
        return math.nan
    filled = totals.count > 0
    n, confidence = totals.count[filled], totals.confidence_sum[filled]
    variance = np.maximum(confidence - confidence**2 / n, 0)
    mean = np.sqrt(2 / math.pi * variance).sum()
    return float(mean + 3 * math.sqrt((1 - 2 / math.pi) * variance.sum())) / totals.n


def _images(served: int, means: Mapping[str, float]) -> dict[str, Any]:
    counts = {"served": served, "labelled": 0, "label_coverage": 0.0}
    return counts | {"expected_accuracy": means.get("confidence"), "images": dict(means)}


def _counts(bins: Mapping[int | None, tuple[int, float]], labelled: int) -> dict[str, Any]:
    served = sum(n for n, _ in bins.values())
    return {
        "served": served,
        "labelled": labelled,
        "label_coverage": _ratio(labelled, served),
    }


def _classification(
    bins: Mapping[int | None, tuple[int, float]], totals: ClassificationTotals
) -> dict[str, Any]:
    served = sum(n for n, _ in bins.values())
    by_bin = np.array([bins.get(i, (0, 0.0))[0] for i in range(len(BIN_LABELS))])
    weighed, bias = post_stratified(by_bin, totals), measured_bias(by_bin, totals)
    return {
        "accuracy": _number(totals.accuracy),
        "expected_accuracy": _ratio(sum(c for _, c in bins.values()), served),
        "ece": _number(totals.ece),
        "debiased_ece": _number(debiased_ece(totals)),
        "ece_noise_floor": _number(noise_floor(totals)),
        "log_loss": _number(totals.log_loss),
        "brier": _number(totals.brier),
        "expected_accuracy_bias": _number(bias.raw),
        "expected_accuracy_bias_error": _number(bias.raw_error),
        "expected_accuracy_bias_spread": _number(bias.spread),
        "stratified_expected_accuracy_bias": _number(bias.stratified),
        "stratified_expected_accuracy_bias_error": _number(bias.stratified_error),
        "stratified_accuracy": _number(weighed.accuracy),
        "stratified_ece": _number(weighed.ece),
        "stratified_ece_noise_floor": _number(weighed.ece_floor),
        "stratified_share": _number(weighed.share),
        "coverage": _levels(totals),
        "bins": [
            {
                "bin": label,
                "served": bins.get(i, (0, 0.0))[0],
                "labelled": int(totals.count[i]),
                "label_coverage": _ratio(int(totals.count[i]), bins.get(i, (0, 0.0))[0]),
                "correct": int(totals.correct[i]),
                "accuracy": _ratio(int(totals.correct[i]), int(totals.count[i])),
                "confidence": _ratio(float(totals.confidence_sum[i]), int(totals.count[i])),
            }
            for i, label in enumerate(BIN_LABELS)
        ],
    }


def _regression(totals: RegressionTotals) -> dict[str, Any]:
    return {
        "rmse": _number(totals.rmse),
        "mae": _number(totals.mae),
        "crps": _number(totals.crps),
        "log_loss": _number(totals.log_loss),
        "coverage": _levels(totals),
    }


def _levels(totals: Totals) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "labelled": level.labeled,
            "covered": level.covered,
            "coverage": _number(level.coverage),
            "mean_size": _number(level.mean_size),
        }
        for name, level in sorted(totals.levels.items())
    }


def _ratio(total: float, n: int) -> float | None:
    return total / n if n else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
