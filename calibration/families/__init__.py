"""What may come after temperature and module strength: richer maps of probabilities.

A family takes log-probabilities to log-probabilities over the last axis, and is fitted on
calibration rows after everything else. Each page has ``fit(log_p, y) -> tensors``, ``apply`` (its
float64 definition, any leading axes) and ``emit`` (the same as a graph fragment).
"""

from __future__ import annotations

from calibration.families.family import (
    BINARY,
    FAMILIES,
    Family,
    apply_family,
    emit_family,
    fit_family,
)

__all__ = ["BINARY", "FAMILIES", "Family", "apply_family", "emit_family", "fit_family"]
