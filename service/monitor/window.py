"""Figures of the latest predictions of a ledger: a window of time, not all that was ever read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from calibration.drift.label_free import Bias, measured_bias
from calibration.metrics.totals import ClassificationTotals
from service import account

WIDE = 1.96  # standard errors of an interval of 95 %
CHANCE = 3.0  # standard deviations that a calibrated model's bias stays within


def windowed(conn: sa.Connection, window_s: float) -> list[dict[str, Any]]:
    """Calibration of the predictions of the last ``window_s`` seconds, an object per model and
    version; see `service.summary`."""
    since = time.time() - window_s
    models: list[dict[str, Any]] = account.calibration(conn, None, since)["models"]
    return models


def bias_of(model: Mapping[str, Any]) -> Bias | None:
    """The bias of expected accuracy in one object of `windowed`; None without labels, and for what
    has no confidence."""
    bins = model.get("bins", [])
    if not any(b["labelled"] for b in bins):
        return None
    count = np.array([b["labelled"] for b in bins], np.int64)
    labelled = ClassificationTotals(
        count=count,
        correct=np.array([b["correct"] for b in bins], np.int64),
        confidence_sum=count * np.array([b["confidence"] or 0.0 for b in bins]),
    )
    return measured_bias(np.array([b["served"] for b in bins]), labelled)


def bounds_of(bias: Bias) -> dict[str, dict[str, float]]:
    """The bias by kind, ``raw`` and ``stratified``: its ``value``, ``lower`` and ``upper`` of 95 %
    by the normal law, and of ``raw`` the ``chance`` that a calibrated model's stays within."""
    found = {}
    for kind in ("raw", "stratified"):
        value, wide = getattr(bias, kind), WIDE * getattr(bias, f"{kind}_error")
        if np.isfinite(value):
            found[kind] = {"value": value, "lower": value - wide, "upper": value + wide}
    if "raw" in found:
        found["raw"]["chance"] = CHANCE * bias.spread
    return found
