"""Which rows of a table may be measured on: those that the fit used for nothing but testing."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq

from calibration.bundle import REFERENCE, Bundle
from posthoc.contract import Array
from posthoc.data import Rows


class Unseen:
    """Tells the usable rows of a batch, by the hashes that a bundle remembers."""

    def __init__(self, bundle: Bundle):
        self.hashes = seen_hashes(bundle)
        self.keys = seen_hashes(bundle, "split_key")

    def usable(self, rows: Rows, labelled: bool) -> Array:
        """Rows (a mask) without a fault that, where ``labelled``, neither the fit nor a sibling of
        theirs in it has seen."""
        keep = np.ones(len(rows), bool)
        keep[list(rows.bad)] = False
        if labelled:
            keep &= ~_among(rows.content_hashes, self.hashes)
            keep &= ~_among(rows.split_keys, self.keys)
        return keep


def seen_hashes(bundle: Bundle, column: str = "row_hash") -> Array:
    """Sorted hashes (or split keys) of the rows that the fit used for anything but testing."""
    table = pq.read_table(io.BytesIO(bundle.files[REFERENCE]), columns=["role", column])
    role = np.asarray(table["role"].to_pylist())
    return np.unique(np.asarray(table[column])[role != "test"])


def _among(values: Array, known: Array) -> Array:
    """Whether each value is among the sorted ``known``: a search, where np.isin would sort all."""
    if len(known) == 0:
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.asarray(known[at] == values)
