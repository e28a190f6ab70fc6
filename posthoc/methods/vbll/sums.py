"""The sums over rows that a regression needs: a fold, so that rows may come in any pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Features, FitError
from posthoc.methods.vbll.coordinates import Affine, standard, with_one


@dataclass(frozen=True, slots=True)
class Sums:
    """Over rows with phi~ = (phi, 1) and residuals r = y - z: ``outer`` P×P of phi~ phi~',
    ``cross`` P×K of phi~ r', ``squares`` K of r², and ``n`` rows."""

    n: int
    outer: F64
    cross: F64
    squares: F64


def empty(features: int, outputs: int) -> Sums:
    """No rows yet, for P - 1 features and K outputs."""
    p = features + 1
    return Sums(0, np.zeros((p, p)), np.zeros((p, outputs)), np.zeros(outputs))


def add(sums: Sums, batch: Features) -> Sums:
    """The rows of a batch as well."""
    assert batch.phi is not None
    phi = with_one(np.asarray(batch.phi, np.float64))
    r = np.asarray(batch.y, np.float64) - np.asarray(batch.z, np.float64)
    return Sums(
        sums.n + len(batch),
        sums.outer + phi.T @ phi,
        sums.cross + phi.T @ r,
        sums.squares + (r**2).sum(0),
    )


def merge(a: Sums, b: Sums) -> Sums:
    """Both sets of rows."""
    return Sums(a.n + b.n, a.outer + b.outer, a.cross + b.cross, a.squares + b.squares)


@dataclass(frozen=True, slots=True)
class Problem:
    """The regression of the residuals on standardised features, counted ``emphasis`` times:
    ``gram`` P×P with eigenvalues ``values`` and eigenvectors ``basis``, ``cross`` P×K in the
    eigenbasis, ``squares`` K and ``n``."""

    affine: Affine
    gram: F64
    values: F64
    basis: F64
    cross: F64
    squares: F64
    n: float


def problem(sums: Sums, emphasis: float, name: str) -> Problem:
    """Standardise and diagonalise. Raises FitError, naming the module, for no rows and for an
    output whose residuals are all zero."""
    if sums.n == 0:
        raise FitError(f"{name} was given no rows")
    if not (sums.squares > 0).all():
        k = int(np.argmin(sums.squares))
        raise FitError(
            f"{name}: the model predicts output {k} without error; check the labels for leakage"
        )
    mean = sums.outer[-1, :-1] / sums.n
    variance = np.maximum(np.diag(sums.outer)[:-1] / sums.n - mean**2, 0.0)
    affine = standard(mean, variance)
    change = np.diag(np.append(affine.inverse, 1.0))
    change[:-1, -1] = -affine.inverse * affine.centre
    gram = change @ sums.outer @ change.T * emphasis
    values, basis = np.linalg.eigh((gram + gram.T) / 2)
    return Problem(
        affine,
        gram,
        np.maximum(values, 0.0),
        basis,
        basis.T @ (change @ sums.cross) * emphasis,
        sums.squares * emphasis,
        sums.n * emphasis,
    )
