"""The ratio of two densities of a model's outputs, by telling the two samples apart.

A logistic regression of "this row is from production" on the standardised outputs, linear and
squared; its odds, times the ratio of the sample sizes, are the weight of a row (Bickel, Brückner &
Scheffer 2009, JMLR 10). A ridge chosen by five folds pulls to no shift at all; weights are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
REACH = 5.0  # standard deviations that an output may count
MOST = 50.0  # of a weight, whose mean is one


@dataclass(frozen=True, slots=True)
class DensityRatio:
    """log w = clip(b + a·f(z)), f the standardised outputs and their squares."""

    mean: F64
    scale: F64
    weight: F64
    bias: float

    def weights(self, z: Array) -> F64:
        """Weights N of outputs N×C, at most MOST."""
        log_w = design(z, self.mean, self.scale) @ self.weight + self.bias
        return np.asarray(np.exp(np.clip(log_w, -np.log(MOST), np.log(MOST))))

    def emit(self, g: Fragment, z: str) -> str:
        """The same as a graph fragment, N."""
        c = len(self.mean)
        x = g.op("Mul", g.op("Sub", z, g.const(self.mean[None])), g.const(self.scale[None]))
        x = g.op("Max", g.op("Min", x, g.const(REACH)), g.const(-REACH))
        linear = g.op("MatMul", x, g.const(self.weight[:c, None]))
        squared = g.op("MatMul", g.op("Mul", x, x), g.const(self.weight[c:, None]))
        log_w = g.op("Add", g.op("Add", linear, squared), g.const(self.bias))
        bound = float(np.log(MOST))
        log_w = g.op("Max", g.op("Min", log_w, g.const(bound)), g.const(-bound))
        return g.op("Exp", g.op("Squeeze", log_w, g.const([1], "int64")))

    def tensors(self) -> dict[str, Array]:
        """What a bundle keeps."""
        return {
            "mean": self.mean,
            "scale": self.scale,
            "weight": self.weight,
            "bias": np.asarray([self.bias]),
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Array]) -> DensityRatio:
        """From what a bundle keeps."""
        bias = float(tensors["bias"][0])
        return cls(tensors["mean"], tensors["scale"], tensors["weight"], bias)


def design(z: Array, mean: Array, scale: Array) -> F64:
    """The standardised outputs N×C and their squares, N×2C."""
    x = np.clip((np.asarray(z, np.float64) - mean) * scale, -REACH, REACH)
    return np.concatenate([x, x**2], axis=1)


def fit_density_ratio(source: Array, target: Array, seed: int = 0) -> DensityRatio:
    """The ratio of the density of ``target`` M×C to that of ``source`` N×C.

    Raises FitError for a sample of fewer than ten rows and for outputs that are not finite.
    """
    s, t = np.asarray(source, np.float64), np.asarray(target, np.float64)
    for name, sample in (("labelled", s), ("production", t)):
        if len(sample) < 2 * FOLDS:
            raise FitError(f"{len(sample)} {name} rows are too few to know a shift from")
        if not np.isfinite(sample).all():
            raise FitError(f"an output of the frozen model is not finite on a {name} row")
    mean = s.mean(0)
    deviation = s.std(0)
    scale = np.where(deviation > 1e-7 * np.maximum(1.0, np.abs(mean)), 1.0, 0.0)
    scale = scale / np.where(deviation > 0, deviation, 1.0)
    x = design(np.concatenate([s, t]), mean, scale)
    y = np.repeat([0.0, 1.0], [len(s), len(t)])
    fold = np.random.default_rng(seed).permutation(len(y)) % FOLDS
    losses = []
    for ridge in RIDGES:
        lost = 0.0
        for k in range(FOLDS):
            w = _logistic(x[fold != k], y[fold != k], ridge)
            odds = x[fold == k] @ w[:-1] + w[-1]
            lost += float((np.logaddexp(0, odds) - y[fold == k] * odds).sum())
        losses.append(lost)
    w = _logistic(x, y, RIDGES[int(np.argmin(losses))])
    return DensityRatio(mean, scale, w[:-1], float(w[-1] - np.log(len(t) / len(s))))


def _logistic(x: F64, y: F64, ridge: float) -> F64:
    from scipy.optimize import minimize  # here: who serves a bundle imports no scipy
    from scipy.special import expit

    n = len(y)

    def value(w: Array) -> tuple[float, F64]:
        odds = x @ w[:-1] + w[-1]
        loss = float((np.logaddexp(0, odds) - y * odds).mean()) + ridge * float(w[:-1] @ w[:-1])
        residual = (expit(odds) - y) / n
        return loss, np.append(x.T @ residual + 2 * ridge * w[:-1], residual.sum())

    start = np.zeros(x.shape[1] + 1)
    return np.asarray(minimize(value, start, jac=True, method="L-BFGS-B").x)
