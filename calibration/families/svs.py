"""Structured vector scaling: a factor and an offset for every class; see `structured`."""

from __future__ import annotations

from calibration.families import structured
from calibration.families.structured import apply, emit
from posthoc.contract import Array

__all__ = ["apply", "emit", "fit"]


def fit(log_p: Array, y: Array) -> dict[str, Array]:
    """`structured.fit` of log-probabilities N×C and classes N."""
    return structured.fit(log_p, y, matrix=False)
