"""Exact nearest neighbours by the angle: a float32 product screens, float64 decides."""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, Array

LEAST = 1e-12  # a shorter row is not made a unit one
CELLS = 2**24  # cosines held at a time, 64 MB: fewer rows at a time make a slow product
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
    size = min(len(queries), max(1, CELLS // len(bank)))
    held = np.empty((size, len(bank)), np.float32)  # pages are touched for the first time once
    found = np.empty(len(queries))
    for i in range(0, len(queries), size):
        block = queries[i : i + size]
        cosines = np.matmul(block.astype(np.float32), bank.T, out=held[: len(block)])
        found[i : i + size] = _exact(block, bank, k, cosines)
    return found


def _exact(queries: F64, bank: Array, k: int, cosines: Array) -> F64:
    slack = 2.0 * (queries.shape[1] + 2) * 2.0**-24
    row, column, near = _at_least(cosines, k, slack)
    order, first = _ordered(row, near, len(queries))
    kth = near[order[first + k - 1]].astype(np.float64)[row]
    # Those surely above the k-th need no second look; it is the next but so many of the others.
    above = np.bincount(row[near > kth + slack], minlength=len(queries))
    close = np.abs(near - kth) <= slack
    row, column = row[close], column[close]
    exact = np.empty(len(row))
    for i in range(0, len(row), PAIRS):
        part = slice(i, i + PAIRS)
        exact[part] = (queries[row[part]] * bank[column[part]]).sum(1)
    order, first = _ordered(row, exact, len(queries))
    return np.asarray(exact[order[first + k - 1 - above]])


def _at_least(cosines: Array, k: int, slack: float) -> tuple[Array, Array, Array]:
    """(row, column, value) of all ``cosines`` N×M that the k-th largest of a row, less ``slack``,
    does not exceed, and perhaps a few more."""
    n, m = cosines.shape
    groups = m // GROUP
    if groups < 2 * k:
        row, column = np.nonzero(cosines >= _kth(cosines, k) - slack)
        return row, column, cosines[row, column]
    # The k groups of the largest maxima hold the k largest, but for the columns left over.
    width = groups * GROUP
    largest = cosines[:, :width].reshape(n, GROUP, groups).max(1)
    least = _kth(largest, k) - slack
    row, group = np.nonzero(largest >= least)
    row, column = np.repeat(row, GROUP), (group[:, None] + groups * np.arange(GROUP)).ravel()
    more, rest = np.nonzero(cosines[:, width:] >= least)
    row, column = np.append(row, more), np.append(column, rest + width)
    near = cosines[row, column]
    keep = near >= least[row, 0]
    return row[keep], column[keep], near[keep]


def _ordered(row: Array, values: Array, n: int) -> tuple[Array, Array]:
    """(the order by row and from the largest value, where each of n rows begins in it)."""
    order = np.lexsort((-values, row))
    return order, np.searchsorted(row[order], np.arange(n))


def _kth(values: Array, k: int) -> Array:
    """The k-th largest of each row, N×1."""
    place = values.shape[1] - k
    return np.partition(values, place, axis=1)[:, place : place + 1]
