"""Seeded corruptions of a frozen model's inputs: what it meets when something upstream breaks.

Five severities; 0 would do nothing and is none. A row is corrupted by itself: in any batch, in any
order, the same row with the same key and seed comes out the same.
"""

from __future__ import annotations

from calibration.corruption.registry import (
    CORRUPTIONS,
    Corruption,
    Kind,
    Measured,
    corrupt,
    kind_of,
    measure,
    merge,
)

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "Kind",
    "Measured",
    "corrupt",
    "kind_of",
    "measure",
    "merge",
]
