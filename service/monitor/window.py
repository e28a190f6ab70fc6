"""Figures of the latest predictions of a ledger: a window of time, not all that was ever read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from service import account

WIDE = 1.96  # standard errors of an interval of 95 %
CHANCE = 3.0  # standard deviations that a calibrated model's bias stays within
_BIAS = "expected_accuracy_bias"


def windowed(conn: sa.Connection, window_s: float) -> list[dict[str, Any]]:
    """Calibration of the predictions of the last ``window_s`` seconds, an object per model and
    version; see `service.summary`."""
    since = time.time() - window_s
    models: list[dict[str, Any]] = account.calibration(conn, None, since)["models"]
    return models


def bounds_of(model: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The bias of expected accuracy in one object of `windowed` by kind, ``raw`` and
    ``stratified``: its ``value``, ``lower`` and ``upper`` of 95 % by the normal law, and of ``raw``
    the ``chance`` that a calibrated model's stays within. Empty without labels, and for what has no
    confidence."""
    found = {}
    for kind, name in (("raw", _BIAS), ("stratified", f"stratified_{_BIAS}")):
        if (value := model.get(name)) is not None:
            wide = WIDE * model[f"{name}_error"]
            found[kind] = {"value": value, "lower": value - wide, "upper": value + wide}
    if "raw" in found:
        found["raw"]["chance"] = CHANCE * model[f"{_BIAS}_spread"]
    return found
