"""Gaussian posteriors of the weights of K outputs over P features, one covariance an output.

``diagonal`` S_k = diag(s_k); ``lowrank`` S_k^-1 = diag(a_k) + V_k V_k' with V_k P×R; ``dense``
S_k = U_k U_k' with U_k P×P. The paper's package adds its few directions to the covariance instead,
but what rows teach are directions of high precision: on magika's features rank 3 gained 28 of the
122 nats between diagonal and dense in the precision, and 1 in the covariance.

A state holds ``variance`` K×P; for low rank also ``reduction`` K×P×R, S_k = diag(variance_k) -
G_k G_k'; for dense ``factor`` K×P×P, or for outputs that share their eigenvectors ``basis`` P×P
and ``spectrum`` P×K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from posthoc.contract import F64, Array, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

Kind = Literal["diagonal", "lowrank", "dense"]
MAX_DENSE = 2**25  # numbers K P²: 256 MiB, and twice as much again while it is fitted
# Of the way to an epoch's curvature that a covariance goes. Where the rows are separable, a smaller
# variance makes for a smaller curvature and so for a larger variance: whole steps oscillate.
DAMPING = 0.5


def check_dense(outputs: int, features: int, name: str) -> None:
    """FitError where dense covariances would not fit into memory."""
    if outputs * features**2 > MAX_DENSE:
        raise FitError(
            f"{name}: {outputs} dense covariances over {features} features are "
            f"{outputs * features**2:,} numbers, above the limit of {MAX_DENSE:,}; take "
            "covariance=diagonal or covariance=lowrank"
        )


def quadratic(tensors: dict[str, Array], x: F64) -> F64:
    """Variances N×K of the outputs at rows x N×P: x' S_k x."""
    if "basis" in tensors:
        return np.asarray((x @ tensors["basis"]) ** 2 @ tensors["spectrum"])
    if "factor" in tensors:
        return _squared_lengths(x, tensors["factor"])
    found = x**2 @ tensors["variance"].T
    if "reduction" in tensors:
        found = np.maximum(found - _squared_lengths(x, tensors["reduction"]), 0.0)
    return np.asarray(found)


def _squared_lengths(x: F64, factor: Array) -> F64:
    """|U_k' x|², N×K, by as many products as there are outputs or columns, the fewer of them."""
    outputs, _, rank = factor.shape
    if outputs <= rank:
        return np.stack([((x @ u) ** 2).sum(1) for u in factor], 1)
    found = np.zeros((len(x), outputs))
    for r in range(rank):
        found += (x @ factor[:, :, r].T) ** 2
    return found


def emit_quadratic(g: Fragment, tensors: dict[str, Array], x: str) -> str:
    """The same as a graph fragment, for rows N×(P-1) whose constant feature 1 is left out."""
    if "basis" in tensors:
        basis = tensors["basis"]
        projected = g.op("Gemm", x, g.const(basis[:-1]), g.const(basis[-1]))
        squared = g.op("Mul", projected, projected)
        return g.op("MatMul", squared, g.const(tensors["spectrum"]))
    if "factor" in tensors:
        return _emit_squared_lengths(g, tensors["factor"], x)
    variance = tensors["variance"].T
    squared = g.op("Mul", x, x)
    found = g.op("Gemm", squared, g.const(variance[:-1]), g.const(variance[-1]))
    if "reduction" in tensors:
        less = _emit_squared_lengths(g, tensors["reduction"], x)
        found = g.op("Max", g.op("Sub", found, less), g.const(0.0))
    return found


def _emit_squared_lengths(g: Fragment, factor: Array, x: str) -> str:
    outputs, _, rank = factor.shape
    flat = factor.transpose(1, 0, 2).reshape(-1, outputs * rank)
    projected = g.op("Gemm", x, g.const(flat[:-1]), g.const(flat[-1]))
    squared = g.op("Mul", projected, projected)
    return g.sum(g.op("Reshape", squared, g.const([-1, outputs, rank], "int64")), 2)


class Diagonal:
    """S_k = diag(s_k), the inverse of the curvature's diagonal: 3 K P numbers."""

    def __init__(self, curvature: F64):
        self._curvature, self._seen = curvature, np.zeros_like(curvature)

    def add(self, x: F64, weight: F64) -> None:
        """See rows x N×P, at which the bound has curvatures N×K by the outputs."""
        self._seen += weight.T @ x**2

    def settle(self) -> None:
        """Take over the curvature of the rows seen since the last call, an epoch's."""
        self._curvature += DAMPING * (self._seen - self._curvature)
        self._seen[:] = 0.0

    def update(self, prior: float, emphasis: float) -> None:
        """The best covariances for the curvature, ``emphasis`` times, and a prior variance."""
        self.variance = 1.0 / (1.0 / prior + emphasis * self._curvature)

    def trace(self) -> float:
        """The sum of tr S_k."""
        return float(self.variance.sum())

    def log_det(self) -> float:
        """The sum of log |S_k|."""
        return float(np.log(self.variance).sum())

    def tensors(self) -> dict[str, Array]:
        """For a state, and for `quadratic`."""
        return {"variance": self.variance}


class Dense:
    """S_k = U_k U_k', the inverse of the whole curvature: 3 K P² numbers."""

    def __init__(self, curvature: F64):
        outputs, features = curvature.shape
        self._curvature = np.zeros((outputs, features, features))
        self._curvature[:, range(features), range(features)] = curvature
        self._seen = np.zeros_like(self._curvature)
        self.factor = np.zeros_like(self._curvature)

    def add(self, x: F64, weight: F64) -> None:
        """See `Diagonal.add`."""
        for seen, w in zip(self._seen, weight.T, strict=True):
            seen += (w[:, None] * x).T @ x

    def settle(self) -> None:
        """See `Diagonal.settle`."""
        self._seen -= self._curvature
        self._seen *= DAMPING
        self._curvature += self._seen
        self._seen[:] = 0.0

    def update(self, prior: float, emphasis: float) -> None:
        """See `Diagonal.update`."""
        ridge = np.eye(self.factor.shape[1]) / prior
        for k, curvature in enumerate(self._curvature):
            # S = (L L')^-1 has the factor L'^-1.
            lower = np.linalg.cholesky(emphasis * curvature + ridge)
            self.factor[k] = np.linalg.inv(lower).T

    def trace(self) -> float:
        """The sum of tr S_k."""
        return float((self.factor**2).sum())

    def log_det(self) -> float:
        """The sum of log |S_k|; the factors are triangular."""
        diagonal = np.diagonal(self.factor, axis1=1, axis2=2)
        return float(2.0 * np.log(np.abs(diagonal)).sum())

    def tensors(self) -> dict[str, Array]:
        """See `Diagonal.tensors`."""
        return {"factor": self.factor}


class LowRank:
    """S_k = (diag(a_k) + V_k V_k')^-1 with V_k P×R: 6 K P R numbers.

    V_k V_k' is the Nyström approximation of the curvature from its product with R directions, which
    an epoch gathers; the next epoch's directions are that product, so that they turn towards the
    leading eigenvectors. What the approximation leaves of the diagonal is added to it.
    """

    def __init__(self, curvature: F64, rank: int, rng: np.random.Generator):
        outputs, features = curvature.shape
        self._rest = curvature
        self._low = np.zeros((outputs, features, 0))
        self._seen = np.zeros_like(curvature)
        start = rng.standard_normal((outputs, features, min(rank, features)))
        self._directions = np.linalg.qr(start)[0]
        self._product = np.zeros_like(self._directions)

    def add(self, x: F64, weight: F64) -> None:
        """See `Diagonal.add`."""
        self._seen += weight.T @ x**2
        for r in range(self._directions.shape[2]):
            along = x @ self._directions[:, :, r].T
            self._product[:, :, r] += (weight * along).T @ x

    def settle(self) -> None:
        """See `Diagonal.settle`."""
        b, low = self._directions, self._low
        old = self._rest[:, :, None] * b + low @ (low.transpose(0, 2, 1) @ b)
        product = old + DAMPING * (self._product - old)
        whole = self._rest + (low**2).sum(2)
        whole += DAMPING * (self._seen - whole)
        inner = b.transpose(0, 2, 1) @ product
        values, vectors = np.linalg.eigh((inner + inner.transpose(0, 2, 1)) / 2)
        # Directions without curvature are dropped: their share of the product is rounding.
        least = 1e-10 * np.maximum(values[:, -1:], np.finfo(np.float64).tiny)
        root = np.where(values > least, 1.0 / np.sqrt(np.maximum(values, least)), 0.0)
        self._low = product @ (vectors * root[:, None, :])
        self._rest = np.maximum(whole - (self._low**2).sum(2), 0.0)
        self._directions = np.linalg.qr(product)[0]
        self._seen[:], self._product[:] = 0.0, 0.0

    def update(self, prior: float, emphasis: float) -> None:
        """See `Diagonal.update`."""
        precision = 1.0 / prior + emphasis * self._rest
        low = np.sqrt(emphasis) * self._low
        self.variance, self.reduction, self._log_det = inverse(precision, low)

    def trace(self) -> float:
        """The sum of tr S_k."""
        return float(self.variance.sum() - (self.reduction**2).sum())

    def log_det(self) -> float:
        """The sum of log |S_k|."""
        return float(self._log_det.sum())

    def tensors(self) -> dict[str, Array]:
        """See `Diagonal.tensors`."""
        return {"variance": self.variance, "reduction": self.reduction}


def inverse(precision: F64, low: F64) -> tuple[F64, F64, F64]:
    """(diag(a) + V V')^-1 = diag(s) - G G' for a K×P and V K×P×R: s K×P, G K×P×R and the
    logarithms K of its determinant, by Woodbury's identity."""
    variance = 1.0 / precision
    scaled = variance[:, :, None] * low
    gram = np.eye(low.shape[2]) + low.transpose(0, 2, 1) @ scaled
    lower = np.linalg.cholesky(gram)
    reduction = scaled @ np.linalg.inv(lower).transpose(0, 2, 1)
    log_det = np.log(variance).sum(1) - np.linalg.slogdet(gram)[1]
    return variance, reduction, np.asarray(log_det)


Covariance = Diagonal | Dense | LowRank
