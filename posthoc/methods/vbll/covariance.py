"""Gaussian posteriors of the weights of K outputs over P features, one covariance an output.

``diagonal`` S_k = diag(s_k); ``lowrank`` S_k = diag(s_k) + U_k U_k' with U_k P×R; ``dense``
S_k = U_k U_k' with U_k P×P. A state holds ``variance`` K×P and ``factor`` K×P×R, whichever there
are, or for outputs that share their eigenvectors ``basis`` P×P and ``spectrum`` P×K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from posthoc.contract import F64, Array, FitError
from posthoc.methods.vbll.training import Adam

if TYPE_CHECKING:
    from posthoc.graph import Fragment

Kind = Literal["diagonal", "lowrank", "dense"]
MAX_DENSE = 2**25  # numbers K P²: 256 MiB, and as much again while it is fitted
FIRST_FACTOR = 0.1  # of the diagonal's standard deviation, where a low-rank factor starts


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
    found = np.zeros((len(x), 1))
    if "variance" in tensors:
        found = x**2 @ tensors["variance"].T
    if "factor" in tensors:
        found = found + np.stack([((x @ u) ** 2).sum(1) for u in tensors["factor"]], 1)
    return np.asarray(found)


def emit_quadratic(g: Fragment, tensors: dict[str, Array], x: str) -> str:
    """The same as a graph fragment, for rows N×(P-1) whose constant feature 1 is left out."""
    if "basis" in tensors:
        basis = tensors["basis"]
        projected = g.op("Gemm", x, g.const(basis[:-1]), g.const(basis[-1]))
        squared = g.op("Mul", projected, projected)
        return g.op("MatMul", squared, g.const(tensors["spectrum"]))
    found: str | None = None
    if "variance" in tensors:
        variance = tensors["variance"].T
        squared = g.op("Mul", x, x)
        found = g.op("Gemm", squared, g.const(variance[:-1]), g.const(variance[-1]))
    if "factor" in tensors:
        outputs, _, rank = tensors["factor"].shape
        flat = tensors["factor"].transpose(1, 0, 2).reshape(-1, outputs * rank)
        projected = g.op("Gemm", x, g.const(flat[:-1]), g.const(flat[-1]))
        squared = g.op("Mul", projected, projected)
        apart = g.op("Reshape", squared, g.const([-1, outputs, rank], "int64"))
        more = g.sum(apart, 2)
        found = more if found is None else g.op("Add", found, more)
    assert found is not None
    return found


class Diagonal:
    """S_k = diag(s_k). Given the curvature the best s_k has a closed form: 2 K P numbers."""

    def __init__(self, curvature: F64, prior: float, emphasis: float):
        self.variance = 1.0 / (1.0 / prior + emphasis * curvature)
        self._sum = np.zeros_like(curvature)

    def quadratic(self, x: F64) -> F64:
        """Variances N×K of the outputs."""
        return quadratic(self.tensors(), x)

    def add(self, x: F64, weight: F64, share: float, prior: float, emphasis: float) -> None:
        """See rows x N×P with curvatures N×K of the bound by the outputs; they are the given
        share of all rows."""
        self._sum += weight.T @ x**2

    def settle(self, prior: float, emphasis: float) -> None:
        """The best covariance for the curvature since the last call, which is one epoch's."""
        self.variance = 1.0 / (1.0 / prior + emphasis * self._sum)
        self._sum[:] = 0.0

    def trace(self) -> float:
        """The sum of tr S_k."""
        return float(self.variance.sum())

    def log_det(self) -> float:
        """The sum of log |S_k|."""
        return float(np.log(self.variance).sum())

    def tensors(self) -> dict[str, Array]:
        """For a state."""
        return {"variance": self.variance}


class Dense:
    """S_k = U_k U_k', in closed form too: 2 K P² numbers."""

    def __init__(self, curvature: F64, prior: float, emphasis: float):
        outputs, features = curvature.shape
        start = 1.0 / np.sqrt(1.0 / prior + emphasis * curvature)
        self.factor = np.zeros((outputs, features, features))
        self.factor[:, range(features), range(features)] = start
        self._sum = np.zeros_like(self.factor)

    def quadratic(self, x: F64) -> F64:
        """Variances N×K of the outputs."""
        return quadratic(self.tensors(), x)

    def add(self, x: F64, weight: F64, share: float, prior: float, emphasis: float) -> None:
        """See `Diagonal.add`."""
        for total, w in zip(self._sum, weight.T, strict=True):
            total += (w[:, None] * x).T @ x

    def settle(self, prior: float, emphasis: float) -> None:
        """See `Diagonal.settle`."""
        ridge = np.eye(self._sum.shape[1]) / prior
        for k, total in enumerate(self._sum):
            # S = (L L')^-1 has the factor L'^-1.
            lower = np.linalg.cholesky(emphasis * total + ridge)
            self.factor[k] = np.linalg.inv(lower).T
        self._sum[:] = 0.0

    def trace(self) -> float:
        """The sum of tr S_k."""
        return float((self.factor**2).sum())

    def log_det(self) -> float:
        """The sum of log |S_k|; the factors are triangular."""
        diagonal = np.diagonal(self.factor, axis1=1, axis2=2)
        return float(2.0 * np.log(np.abs(diagonal)).sum())

    def tensors(self) -> dict[str, Array]:
        """For a state."""
        return {"factor": self.factor}


class LowRank:
    """S_k = D_k^½ (I + V_k V_k') D_k^½ with D_k = diag(exp r_k), V_k P×R: no closed form, so that
    r and V climb with the means, mini-batch by mini-batch. 4 K P (R + 1) numbers."""

    def __init__(
        self,
        curvature: F64,
        prior: float,
        emphasis: float,
        rank: int,
        rng: np.random.Generator,
        learning_rate: float,
        steps: int,
    ):
        self.log_scale = -np.log(1.0 / prior + emphasis * curvature)
        self.shape = FIRST_FACTOR * rng.standard_normal((*curvature.shape, rank))
        self._adam = Adam([self.log_scale, self.shape], learning_rate, steps)

    def quadratic(self, x: F64) -> F64:
        """Variances N×K of the outputs."""
        return quadratic(self.tensors(), x)

    def add(self, x: F64, weight: F64, share: float, prior: float, emphasis: float) -> None:
        """One step up the bound on these rows."""
        scale, rank = np.exp(0.5 * self.log_scale), self.shape.shape[2]
        inner = np.empty_like(self.shape)  # sum over rows of w x~ x~' V, with x~ = D^½ x
        for r in range(rank):
            along = x @ (scale * self.shape[:, :, r]).T
            inner[:, :, r] = scale * ((weight * along).T @ x)
        own = scale**2 * (weight.T @ x**2)
        log_scale, shape = self.gradients(own, inner, share, prior, emphasis)
        self._adam.step([log_scale, shape])

    def gradients(
        self, own: F64, inner: F64, share: float, prior: float, emphasis: float
    ) -> tuple[F64, F64]:
        """Of ``emphasis`` times the bound minus the share of the divergence, by r and V, over the
        share; ``own`` is the sum of w x~² K×P and ``inner`` of w x~ x~' V K×P×R."""
        v, rate = self.shape, emphasis / share
        variance = np.exp(self.log_scale)
        log_scale = 1.0 - variance * (1.0 + (v**2).sum(2)) / prior
        log_scale -= rate * (own + (v * inner).sum(2))
        gram = np.eye(v.shape[2]) + np.einsum("kpr,kps->krs", v, v)
        shape = v @ np.linalg.inv(gram)
        shape -= variance[:, :, None] * v / prior + rate * inner
        return 0.5 * log_scale, shape

    def settle(self, prior: float, emphasis: float) -> None:
        """Nothing: every mini-batch moves it."""

    def trace(self) -> float:
        """The sum of tr S_k."""
        return float((np.exp(self.log_scale) * (1.0 + (self.shape**2).sum(2))).sum())

    def log_det(self) -> float:
        """The sum of log |S_k|, by the determinant lemma."""
        gram = np.eye(self.shape.shape[2]) + np.einsum("kpr,kps->krs", self.shape, self.shape)
        return float(self.log_scale.sum() + np.linalg.slogdet(gram)[1].sum())

    def tensors(self) -> dict[str, Array]:
        """For a state."""
        scale = np.exp(0.5 * self.log_scale)
        return {"variance": scale**2, "factor": scale[:, :, None] * self.shape}


Covariance = Diagonal | Dense | LowRank
