"""Exact nearest neighbours by the angle: a float32 product screens, float64 decides."""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, Array

LEAST = 1e-12  # a shorter row is not made a unit one
CELLS = 2**22  # cosines held at a time, 16 MB
PAIRS = 2**13  # pairs of rows whose product is taken at a time in float64
GROUP = 32  # cosines of which one look takes the largest


def unit(phi: Array) -> F64:
    """Rows N×D at length one, in float64; a row of zeros stays one."""
    x = np.asarray(phi, np.float64)
    length = np.sqrt((x * x).sum(1, keepdims=True))
    return np.asarray(x / np.maximum(length, LEAST))


def kth_cosine(queries: F64, bank: Array, k: int) -> F64:
    """The k-th largest product of each of ``queries`` N×D with the rows of ``bank`` M×D, both at
    length one (bank in float32), as if all were in float64.

    Float32 finds which can be it: a product of D terms errs by less than D + 2 units of 2**-24
    (Higham 2002, eq. 3.5), and all within twice that of the k-th are looked at again. Memory is
    bounded whatever N and M.
    """
    size = max(1, CELLS // len(bank))
    found = [_block(queries[i : i + size], bank, k) for i in range(0, len(queries), size)]
    return np.concatenate(found) if found else np.zeros(0)


def _block(queries: F64, bank: Array, k: int) -> F64:
    cosines = queries.astype(np.float32) @ bank.T
    n, m = cosines.shape
    slack = 2.0 * (queries.shape[1] + 2) * 2.0**-24
    groups = m // GROUP
    if groups >= 2 * k:
        # The k groups of the largest maxima hold the k largest, but for the columns left over.
        whole = cosines[:, : groups * GROUP].reshape(n, GROUP, groups)
        heads = whole.max(1)
        least = _kth(heads, k) - slack
        row, group = np.nonzero(heads >= least)
        column = (group[:, None] + groups * np.arange(GROUP)).ravel()
        row = np.repeat(row, GROUP)
        rest_row, rest = np.nonzero(cosines[:, groups * GROUP :] >= least)
        row, column = np.append(row, rest_row), np.append(column, rest + groups * GROUP)
        near = cosines[row, column]
        # Now the k-th among these, which is that of all.
        order = np.lexsort((-near, row))
        first = np.searchsorted(row[order], np.arange(n))
        keep = near >= (near[order[first + k - 1]] - slack)[row]
        row, column = row[keep], column[keep]
    else:
        row, column = np.nonzero(cosines >= _kth(cosines, k) - slack)
    exact = np.concatenate(
        [
            np.einsum("ij,ij->i", queries[row[i : i + PAIRS]], bank[column[i : i + PAIRS]])
            for i in range(0, len(row), PAIRS)
        ]
    )
    order = np.lexsort((-exact, row))
    first = np.searchsorted(row[order], np.arange(n))
    return np.asarray(exact[order[first + k - 1]])


def _kth(values: Array, k: int) -> Array:
    """The k-th largest of each row, N×1."""
    place = values.shape[1] - k
    return np.partition(values, place, axis=1)[:, place : place + 1]
