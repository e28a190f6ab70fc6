"""What the Mahalanobis scores of classes share: means by class under one covariance.

With S the covariance within classes, shrunk, and S0 that around the common mean mu:

    nearest   min_c (phi - mu_c)' S^-1 (phi - mu_c)                    (Lee et al. 2018)
    relative  the nearest less (phi - mu)' S0^-1 (phi - mu)            (Ren et al. 2021)

``unit`` scores read phi / |phi| in place of phi, from the means on (Mueller & Hein 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, LinearHead, State
from posthoc.ood.gaussian import ClassSums, add, empty, exact, join, real, shrunk_inverse

if TYPE_CHECKING:
    from posthoc.graph import Fragment

SMALLEST = 1e-12  # a norm below it is that of a row of zeros


@dataclass(frozen=True, slots=True)
class _Folded:
    """The sums of a score called ``name``; ``unit``: of rows of length one."""

    name: str
    unit: bool = False

    def init(self, n_classes: int, n_features: int) -> ClassSums:
        """No rows."""
        return empty(n_classes, n_features)

    def update(self, stats: ClassSums, batch: Features) -> ClassSums:
        """Add the features and labels of a batch."""
        phi = self.ready(real(batch, self.name))
        return add(stats, Features(phi, batch.z, batch.y), by_class=True, name=self.name)

    def merge(self, a: ClassSums, b: ClassSums) -> ClassSums:
        """The sums of both."""
        return join(a, b)

    def ready(self, phi: Array | None) -> F64:
        """The features that are measured, N×D in float64."""
        rows = np.asarray(phi, np.float64)
        if not self.unit:
            return rows
        norm = np.sqrt((rows * rows).sum(1, keepdims=True))
        return np.asarray(rows / np.maximum(norm, SMALLEST))

    def emit_ready(self, g: Fragment, phi: str | None) -> str:
        """The same as a graph fragment."""
        assert phi is not None
        if not self.unit:
            return phi
        norm = g.op("Sqrt", g.sum(g.op("Mul", phi, phi), 1, keepdims=True))
        return g.op("Div", phi, g.op("Max", norm, g.const(SMALLEST)))

    def means(self, stats: ClassSums) -> tuple[F64, F64, float]:
        """Means of the classes with rows, K×D, and the inverse covariance within them, D×D, with
        its shrinkage."""
        seen = stats.count > 0
        means = stats.total[seen] / stats.count[seen][:, None]
        between = (means * stats.count[seen][:, None]).T @ means
        inverse, rho = shrunk_inverse(
            stats.outer - between,
            stats.n,
            size=float(np.trace(stats.outer)),
            name=self.name,
            within=" within every class",
        )
        return means, inverse, rho


@dataclass(frozen=True, slots=True)
class Nearest(_Folded):
    """Distance to the nearest class mean."""

    def finish(self, stats: ClassSums, head: LinearHead | None = None) -> State:
        """Means around a centre, a factor of the inverse covariance, and what tells which mean is
        nearest; classes without rows are left out.

        Raises FitError for no rows, and for features that are constant within every class.
        """
        del head
        if stats.n == 0:
            raise FitError(f"{self.name} was given no rows")
        means, inverse, rho = self.means(stats)
        centre = exact(stats.mean)
        nu = exact(means - centre)
        linear = inverse @ nu.T
        return State(
            {
                "centre": centre,
                "means": nu,
                "linear": linear,
                "constant": -(nu * linear.T).sum(1) / 2,
                "factor": np.linalg.cholesky((inverse + inverse.T) / 2),
            },
            {"rows": int(stats.n), "classes_seen": len(means), "shrinkage": rho},
        )

    def score(self, state: State, phi: Array | None, z: Array) -> F64:
        """Score of N rows from their features N×D (float64 definition)."""
        del z
        t = state.tensors
        psi = self.ready(phi) - t["centre"]
        near = (psi @ t["linear"] + t["constant"]).argmax(1)
        white = (psi - t["means"][near]) @ t["factor"]
        return np.asarray((white * white).sum(1))

    def emit(self, g: Fragment, state: State, phi: str | None, z: str) -> str:
        """The same as a graph fragment; returns the name of a tensor of N."""
        del z
        t = state.tensors
        psi = g.op("Sub", self.emit_ready(g, phi), g.const(t["centre"]))
        own = g.op("Gemm", psi, g.const(t["linear"]), g.const(t["constant"]))
        near = g.op("ArgMax", own, axis=1, keepdims=0)
        # From the mean itself: multiplied out, it is a small difference where means lie far apart.
        away = g.op("Sub", psi, g.op("Gather", g.const(t["means"]), near, axis=0))
        white = g.op("MatMul", away, g.const(t["factor"]))
        return g.sum(g.op("Mul", white, white), 1)


@dataclass(frozen=True, slots=True)
class Relative(_Folded):
    """Distance to the nearest class mean less that to the common mean. Both quadratic forms share
    one D×D product: around a centre m, with psi = phi - m, nu_c = mu_c - m and d = mu - m, the
    score is psi'(S^-1 - S0^-1)psi + 2 psi'S0^-1 d - d'S0^-1 d
    + min_c (-2 psi'S^-1 nu_c + nu_c'S^-1 nu_c)."""

    def finish(self, stats: ClassSums, head: LinearHead | None = None) -> State:
        """Means and inverse covariances; classes without rows are left out.

        Raises FitError for fewer than two classes with rows, or features that are constant within
        every class.
        """
        del head
        seen = int((stats.count > 0).sum())
        if seen < 2:
            raise FitError(f"{self.name} needs rows of at least two classes and has {seen}")
        means, within, rho = self.means(stats)
        mean, n, centre = stats.mean, stats.n, exact(stats.mean)
        common, rho0 = shrunk_inverse(stats.outer - n * np.outer(mean, mean), n, name=self.name)
        nu, rest = means - centre, mean - centre
        linear, away = within @ nu.T, common @ rest
        return State(
            {
                "mean": centre,
                "quadratic": within - common,
                "linear": 2.0 * (away[:, None] - linear),
                "constant": (nu * linear.T).sum(1) - rest @ away,
            },
            {"rows": int(n), "classes_seen": seen, "shrinkage": [rho, rho0]},
        )

    def score(self, state: State, phi: Array | None, z: Array) -> F64:
        """Score of N rows from their features N×D (float64 definition)."""
        del z
        t = state.tensors
        psi = self.ready(phi) - t["mean"]
        own = psi @ t["linear"] + t["constant"]
        return np.asarray(((psi @ t["quadratic"]) * psi).sum(1) + own.min(1))

    def emit(self, g: Fragment, state: State, phi: str | None, z: str) -> str:
        """The same as a graph fragment; returns the name of a tensor of N."""
        del z
        t = state.tensors
        psi = g.op("Sub", self.emit_ready(g, phi), g.const(t["mean"]))
        # min x as -max -x: ONNX Runtime's ReduceMin is several times slower than its ReduceMax.
        near = g.op("Gemm", psi, g.const(-t["linear"]), g.const(-t["constant"]))
        square = g.sum(g.op("Mul", g.op("MatMul", psi, g.const(t["quadratic"])), psi), 1)
        return g.op("Sub", square, g.reduce("ReduceMax", near, 1))
