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

    def near(self, stats: ClassSums) -> tuple[dict[str, Array], F64, float]:
        """(tensors that tell which mean is nearest, inverse covariance within classes D×D, its
        shrinkage): a centre D, the means from there K×D, and the product with them less half their
        square. Classes without rows are left out."""
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
        centre = exact(stats.mean)
        nu = exact(means - centre)
        linear = inverse @ nu.T
        half = -(nu * linear.T).sum(1) / 2
        return {"centre": centre, "means": nu, "linear": linear, "half": half}, inverse, rho

    def away(self, state: State, phi: Array | None) -> tuple[F64, Array]:
        """(features from the nearest mean N×D, which it is N). Distances are taken from that mean
        itself: multiplied out they would be small differences where means lie far apart."""
        t = state.tensors
        psi = self.ready(phi) - t["centre"]
        near = (psi @ t["linear"] + t["half"]).argmax(1)
        return psi - t["means"][near], near

    def emit_away(self, g: Fragment, state: State, phi: str | None) -> tuple[str, str]:
        """The same as a graph fragment."""
        t = state.tensors
        psi = g.op("Sub", self.emit_ready(g, phi), g.const(t["centre"]))
        own = g.op("Gemm", psi, g.const(t["linear"]), g.const(t["half"]))
        near = g.op("ArgMax", own, axis=1, keepdims=0)
        return g.op("Sub", psi, g.op("Gather", g.const(t["means"]), near, axis=0)), near


@dataclass(frozen=True, slots=True)
class Nearest(_Folded):
    """Distance to the nearest class mean."""

    def finish(self, stats: ClassSums, head: LinearHead | None = None) -> State:
        """Means and a factor of the inverse covariance.

        Raises FitError for no rows, and for features that are constant within every class.
        """
        del head
        if stats.n == 0:
            raise FitError(f"{self.name} was given no rows")
        tensors, inverse, rho = self.near(stats)
        factor = np.linalg.cholesky((inverse + inverse.T) / 2)
        said = {"rows": int(stats.n), "classes_seen": len(tensors["means"]), "shrinkage": rho}
        return State({**tensors, "factor": factor}, said)

    def score(self, state: State, phi: Array | None, z: Array) -> F64:
        """Score of N rows from their features N×D (float64 definition)."""
        del z
        white = self.away(state, phi)[0] @ state.tensors["factor"]
        return np.asarray((white * white).sum(1))

    def emit(self, g: Fragment, state: State, phi: str | None, z: str) -> str:
        """The same as a graph fragment; returns the name of a tensor of N."""
        del z
        away, _ = self.emit_away(g, state, phi)
        white = g.op("MatMul", away, g.const(state.tensors["factor"]))
        return g.sum(g.op("Mul", white, white), 1)


@dataclass(frozen=True, slots=True)
class Relative(_Folded):
    """Distance to the nearest class mean less that to the common mean. Both quadratic forms share
    one D×D product: with a = phi - mu_c and e = mu_c - mu the score is
    a'(S^-1 - S0^-1)a - 2 a'S0^-1 e - e'S0^-1 e, and the first term a sum of signed squares: they
    keep the digits that a product with a matrix of wide spectrum loses in float32."""

    def finish(self, stats: ClassSums, head: LinearHead | None = None) -> State:
        """Means and inverse covariances.

        Raises FitError for fewer than two classes with rows, or features that are constant within
        every class.
        """
        del head
        seen = int((stats.count > 0).sum())
        if seen < 2:
            raise FitError(f"{self.name} needs rows of at least two classes and has {seen}")
        tensors, within, rho = self.near(stats)
        mean, n = stats.mean, stats.n
        common, rho0 = shrunk_inverse(stats.outer - n * np.outer(mean, mean), n, name=self.name)
        e = tensors["means"] + (tensors["centre"] - mean)
        gain = 2.0 * e @ common
        values, vectors = np.linalg.eigh(within - common)
        tensors |= {
            "factor": vectors * np.sqrt(np.abs(values)),
            "sign": np.sign(values),
            "gain": gain,
            "constant": (e * gain).sum(1) / 2,
        }
        return State(tensors, {"rows": int(n), "classes_seen": seen, "shrinkage": [rho, rho0]})

    def score(self, state: State, phi: Array | None, z: Array) -> F64:
        """Score of N rows from their features N×D (float64 definition)."""
        del z
        t, (away, near) = state.tensors, self.away(state, phi)
        white = away @ t["factor"]
        rest = (away * t["gain"][near]).sum(1) + t["constant"][near]
        return np.asarray((white * white * t["sign"]).sum(1) - rest)

    def emit(self, g: Fragment, state: State, phi: str | None, z: str) -> str:
        """The same as a graph fragment; returns the name of a tensor of N."""
        del z
        t, (away, near) = state.tensors, self.emit_away(g, state, phi)
        gain, constant = (g.op("Gather", g.const(t[k]), near, axis=0) for k in ("gain", "constant"))
        white = g.op("MatMul", away, g.const(t["factor"]))
        squares = g.op("Mul", g.op("Mul", white, white), g.const(t["sign"]))
        rest = g.op("Add", g.sum(g.op("Mul", away, gain), 1), constant)
        return g.op("Sub", g.sum(squares, 1), rest)
