"""Covariance of the outputs of several inputs under one posterior."""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64


def directions(projected: F64, shrink: F64, vectors: F64) -> F64:
    """Covariance N×C×N×C of outputs: direction r (row of R×C) has between rows n and m the
    covariance ``sum_j x_nj x_mj shrink_jr``, for projected features N×J."""
    pairs = np.stack([(projected * column) @ projected.T for column in shrink.T])
    return np.asarray(np.einsum("rnm,rc,rd->ncmd", pairs, vectors, vectors, optimize=True))
