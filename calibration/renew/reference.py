"""The reference distributions of a renewed bundle.

What the first fit saw stays remembered by its hashes, so that `hedged evaluate` still drops it.
Confidence, entropy, set size and error bar are those of the conformal rows of the renewal, under
the role ``renewed`` and a hash of their id (the ledger keeps no content); those of the first fit
were made by other numbers and are left out. The out-of-distribution scores did not change and stay.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.bundle import REFERENCE, Bundle
from posthoc.contract import F64, Array

ROLE = "renewed"


def former_confidences(bundle: Bundle) -> F64:
    """The confidences that the bundle's reference rows had, none where it remembers none."""
    table = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))
    if "confidence" not in table.column_names:
        return np.zeros(0)
    values = np.asarray(table["confidence"].to_numpy(), np.float64)
    return np.asarray(values[np.isfinite(values)])


def renewed_reference(bundle: Bundle, keys: Array, fresh: dict[str, Array]) -> bytes:
    """The table with N rows of ``keys`` and their ``fresh`` columns N in place of the former
    ones; an earlier renewal's rows go."""
    table = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))
    roles = np.asarray(table["role"].to_pylist(), dtype=object)
    stays, n = roles != ROLE, len(keys)
    columns: dict[str, pa.Array] = {}
    for name in table.column_names:
        if name == "role":
            columns[name] = pa.array([*roles[stays], *[ROLE] * n], pa.string())
        elif name in ("row_hash", "split_key"):
            own = np.asarray(table[name].to_numpy(), np.uint64)[stays]
            columns[name] = pa.array(np.concatenate([own, keys]))
        else:
            own = np.asarray(table[name].to_numpy(), np.float64)[stays]
            if name in fresh:
                own = np.full(len(own), np.nan)
            columns[name] = pa.array(
                np.concatenate([own, np.asarray(fresh.get(name, np.full(n, np.nan)), np.float64)])
            )
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()
