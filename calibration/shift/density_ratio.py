"""The ratio of two densities of what a model says and sees, by telling the two samples apart.

A logistic regression of "this row is from production" on the doubt that a classifier's outputs show
(harder rows need larger sets, and often differ in little else), on doubt and the standardised
outputs, or on these and the features' principal components, whichever tells most on held-out rows;
linear and squared. Its odds, times the ratio of the sample sizes, are the weight of a row (Bickel,
Brückner & Scheffer 2009, JMLR 10). A ridge chosen by five folds pulls to no shift at all; weights
are bounded. What it cannot see, a change of the truth given outputs and features, no weights can
mend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, FitError
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
FOLDS = 5
TUNED = 4_000  # rows of either sample, at most, that the ridge is chosen on
COMPONENTS = 32  # of the features, the most that count
REACH = 5.0  # standard deviations that a covariate may count
MOST = 50.0  # of a weight, whose mean is one
LEAST_SHARE = 0.5  # of production, that labelled rows stand for
SURE = 1e-3  # nats of entropy, below which rows are all alike
_SINGULAR = 1e-3  # of a component's standard deviation, relative to the largest


@dataclass(frozen=True, slots=True)
class DensityRatio:
    """log w = clip(b + a·f), f the K standardised covariates and their squares: the outputs C, with
    a ``temperature`` the entropy of their tempered softmax and its logarithm, and with a ``centre``
    D and a ``projection`` D×… components of the features."""

    mean: F64
    scale: F64
    weight: F64
    bias: float
    temperature: float | None = None
    centre: F64 | None = None
    projection: F64 | None = None

    def weights(self, z: Array, phi: Array | None = None) -> F64:
        """Weights N of outputs N×C and features N×D, at most MOST. Raises FitError where features
        are asked for and there are none."""
        x = outputs(z, self.temperature)
        if self.projection is not None:
            if phi is None:
                raise FitError("the ratio of densities is one of features, and none were given")
            x = np.concatenate([x, (np.asarray(phi) - self.centre) @ self.projection], axis=1)
        log_w = design(x, self.mean, self.scale) @ self.weight + self.bias
        return np.asarray(np.exp(np.clip(log_w, -np.log(MOST), np.log(MOST))))

    def emit(self, g: Fragment, z: str, phi: str | None) -> str:
        """The same as a graph fragment, N."""
        k, parts = len(self.mean), [z]
        if self.temperature is not None:
            log_p = g.op("LogSoftmax", g.op("Mul", z, g.const(1.0 / self.temperature)), axis=-1)
            inside = g.op("Mul", g.op("Exp", log_p), log_p)
            doubt = g.op("Neg", g.sum(inside, 1, keepdims=True))
            parts += [doubt, g.op("Log", g.op("Add", doubt, g.const(SURE)))]
        if self.projection is not None:
            assert phi is not None and self.centre is not None
            away = g.op("Sub", phi, g.const(self.centre[None]))
            parts.append(g.op("MatMul", away, g.const(self.projection)))
        x = parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=1)
        x = g.op("Mul", g.op("Sub", x, g.const(self.mean[None])), g.const(self.scale[None]))
        x = g.op("Max", g.op("Min", x, g.const(REACH)), g.const(-REACH))
        linear = g.op("MatMul", x, g.const(self.weight[:k, None]))
        squared = g.op("MatMul", g.op("Mul", x, x), g.const(self.weight[k:, None]))
        log_w = g.op("Add", g.op("Add", linear, squared), g.const(self.bias))
        bound = float(np.log(MOST))
        log_w = g.op("Max", g.op("Min", log_w, g.const(bound)), g.const(-bound))
        return g.op("Exp", g.op("Squeeze", log_w, g.const([1], "int64")))

    def tensors(self) -> dict[str, Array]:
        """What a bundle keeps."""
        found: dict[str, Array] = {
            "mean": self.mean,
            "scale": self.scale,
            "weight": self.weight,
            "bias": np.asarray([self.bias]),
        }
        if self.temperature is not None:
            found["temperature"] = np.asarray([self.temperature])
        if self.centre is not None and self.projection is not None:
            found |= {"centre": self.centre, "projection": self.projection}
        return found

    @classmethod
    def restored(cls, tensors: Mapping[str, Array]) -> DensityRatio:
        """From what a bundle keeps."""
        bias = float(tensors["bias"][0])
        t = float(tensors["temperature"][0]) if "temperature" in tensors else None
        features = tensors.get("centre"), tensors.get("projection")
        return cls(tensors["mean"], tensors["scale"], tensors["weight"], bias, t, *features)


def outputs(z: Array, temperature: float | None = None) -> F64:
    """Outputs N×C and, of logits with a temperature, the entropy of softmax(z / temperature) and
    its logarithm."""
    x = np.asarray(z, np.float64)
    if temperature is None:
        return x
    log_p = log_softmax(x / temperature)
    doubt = -(np.exp(log_p) * log_p).sum(1)
    return np.column_stack([x, doubt, np.log(doubt + SURE)])


def design(x: Array, mean: Array, scale: Array) -> F64:
    """The standardised covariates N×K and their squares, N×2K."""
    x = np.clip((np.asarray(x, np.float64) - mean) * scale, -REACH, REACH)
    return np.concatenate([x, x**2], axis=1)


def fit_density_ratio(
    source: Array,
    target: Array,
    seed: int = 0,
    *,
    temperature: float | None = None,
    features: tuple[Array, Array] | None = None,
) -> DensityRatio:
    """The ratio of the density of ``target`` M×C to that of ``source`` N×C, outputs of a model.

    ``temperature`` says that they are logits, whose entropy counts too, or alone. ``features`` N×D
    and M×D of the same rows count where they tell the samples apart better.

    Raises FitError for a sample of fewer than ten rows and for values that are not finite.
    """
    s, t = np.asarray(source, np.float64), np.asarray(target, np.float64)
    given = [(s, t)] if features is None else [(s, t), features]
    for whose, (labelled, coming) in zip(("an output", "a feature"), given, strict=False):
        for name, sample in (("labelled", labelled), ("production", coming)):
            if len(sample) < 2 * FOLDS:
                raise FitError(f"{len(sample)} {name} rows are too few to know a shift from")
            if not np.isfinite(sample).all():
                raise FitError(f"{whose} of the frozen model is not finite on a {name} row")
    width = s.shape[1]
    s, t = (outputs(x, temperature) for x in (s, t))
    best, found = _fitted(s, t, seed)
    if temperature is not None:  # few rows hide a change of doubt among hundreds of outputs
        lost, simpler = _fitted(s, t, seed, unseen=width)
        if lost <= best:
            best, found = lost, simpler
    plain = replace(found, temperature=temperature)
    if features is None:
        return plain
    centre, projection = _components(*features)
    if not projection.shape[1]:
        return plain
    s, t = (
        np.concatenate([z, (np.asarray(f) - centre) @ projection], axis=1)
        for z, f in zip((s, t), features, strict=True)
    )
    lost, richer = _fitted(s, t, seed)
    if lost >= best:
        return plain
    return replace(richer, temperature=temperature, centre=centre, projection=projection)


def _fitted(s: F64, t: F64, seed: int, unseen: int = 0) -> tuple[float, DensityRatio]:
    """(log loss of held-out rows, the ratio) of covariates N×K and M×K, with the best ridge; the
    first ``unseen`` of them do not count."""
    mean = s.mean(0)
    deviation = s.std(0)
    scale = np.where(deviation > 1e-7 * np.maximum(1.0, np.abs(mean)), 1.0, 0.0)
    scale = scale / np.where(deviation > 0, deviation, 1.0)
    scale[:unseen] = 0.0
    x = design(np.concatenate([s, t]), mean, scale)
    y = np.repeat([0.0, 1.0], [len(s), len(t)])
    rng = np.random.default_rng(seed)
    kept = np.concatenate(
        [start + rng.permutation(n)[:TUNED] for start, n in ((0, len(s)), (len(s), len(t)))]
    )
    fold = rng.permutation(len(kept)) % FOLDS
    losses, w = np.zeros(len(RIDGES)), np.zeros(x.shape[1] + 1)
    for k in range(FOLDS):
        train, rest = kept[fold != k], kept[fold == k]
        w = np.zeros_like(w)
        for i, ridge in enumerate(RIDGES):  # each from the one before
            w = _logistic(x[train], y[train], ridge, w)
            odds = x[rest] @ w[:-1] + w[-1]
            losses[i] += float((np.logaddexp(0, odds) - y[rest] * odds).sum())
    w = _logistic(x, y, RIDGES[int(np.argmin(losses))], w)
    ratio = DensityRatio(mean, scale, w[:-1], float(w[-1] - np.log(len(t) / len(s))))
    return float(losses.min()), ratio


def _components(source: Array, target: Array) -> tuple[F64, F64]:
    """(centre D, projection D×K) of the principal components of both samples' features together,
    each feature standardised."""
    x = np.concatenate([source, target]).astype(np.float64)
    centre, deviation = x.mean(0), x.std(0)
    alive = deviation > 1e-7 * np.maximum(1.0, np.abs(centre))
    scale = np.where(alive, 1.0 / np.where(alive, deviation, 1.0), 0.0)
    x = (x - centre) * scale
    variance, vectors = np.linalg.eigh(x.T @ x / len(x))
    kept = np.argsort(-variance)[:COMPONENTS]
    kept = kept[variance[kept] > _SINGULAR**2 * max(variance.max(initial=0.0), 1e-300)]
    return centre, np.asarray(scale[:, None] * vectors[:, kept])


def _logistic(x: F64, y: F64, ridge: float, start: F64) -> F64:
    from scipy.optimize import minimize  # here: who serves a bundle imports no scipy
    from scipy.special import expit

    n = len(y)

    def value(w: Array) -> tuple[float, F64]:
        odds = x @ w[:-1] + w[-1]
        loss = float((np.logaddexp(0, odds) - y * odds).mean()) + ridge * float(w[:-1] @ w[:-1])
        residual = (expit(odds) - y) / n
        return loss, np.append(x.T @ residual + 2 * ridge * w[:-1], residual.sum())

    return np.asarray(minimize(value, start, jac=True, method="L-BFGS-B").x)


def check_overlap(share: float) -> None:
    """FitError where labelled rows stand for too small a ``share`` of production rows: the mean
    weight over labelled rows, one where both lie in the same places."""
    if share < LEAST_SHARE:
        raise FitError(
            f"labelled rows stand for {share:.2f} of the production rows, and {LEAST_SHARE} is the "
            "least: most production rows lie where no labelled row does; label some of them"
        )
