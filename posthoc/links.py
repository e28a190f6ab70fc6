"""What a module adds to the frozen outputs, and how that becomes probabilities.

A module describes a random head beside the frozen one. Its outputs minus the frozen outputs are
the deviation ``d``; the calibrated logits are ``z / T + sqrt(s) d``, so that strength s = 0 is
temperature scaling whatever the module, and with s = (k / T)² they are those of the head that lies
the share k of the way from the frozen weights to the module's. Everything here is the definition
in float64; `posthoc.link_graph` writes the same into a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posthoc.contract import F64, Array, FitError
from posthoc.folds import log_softmax

PROBIT = math.pi / 8
N_DRAWS = 16

# From Gaussian logits to probabilities: the probit approximation with one variance a row (keeps
# the argmax) or one a class, the mean over fixed draws, or the Laplace bridge.
Predictive = Literal["probit", "probit_class", "mc", "bridge"]


@dataclass(frozen=True, slots=True)
class Spread:
    """The deviation of N rows: Gaussian, or a mixture of S members where ``variance`` is None.

    Gaussian: mean ``shift`` (N×C; None is zero, the frozen outputs stay) and fluctuations
    ``(amplitude * eps) @ directions`` with eps ~ N(0, I); amplitude N×R (N×1: the same for all R),
    directions R×C. Where no fixed directions exist, ``draws`` N×S×C holds S fixed fluctuations and
    ``class_variance`` N×C their exact variance. ``variance`` is N×K in a regression, and N in a
    classification: the mean variance of the difference of two logits, which is what moves
    probabilities (for two classes exactly the probit's). Only a variance, without amplitude or
    draws, gives no decomposition.

    Mixture: ``draws`` N×S×C are the members' deviations, all that there is.
    """

    variance: F64 | None
    amplitude: F64 | None = None
    directions: F64 | None = None
    draws: F64 | None = None
    class_variance: F64 | None = None
    shift: F64 | None = None

    @property
    def decomposes(self) -> bool:
        """Whether total uncertainty can be divided into aleatoric and epistemic."""
        return self.amplitude is not None or self.draws is not None


@dataclass(frozen=True, slots=True)
class SpreadNames:
    """The same as tensor names of a fragment; variance is N×1 or N×K, directions are constants."""

    variance: str | None
    amplitude: str | None = None
    directions: F64 | None = None
    draws: str | None = None
    class_variance: str | None = None
    shift: str | None = None
    equal: bool = False  # the amplitude is N×1 and stands for R equal ones

    @property
    def keeps_argmax(self) -> bool:
        """Whether the probit link leaves the frozen argmax where it is."""
        return self.variance is not None and self.shift is None

    @property
    def decomposes(self) -> bool:
        """See `Spread.decomposes`."""
        return self.amplitude is not None or self.draws is not None


def softmax(z: Array) -> F64:
    """Softmax over the last axis."""
    return np.exp(log_softmax(z))


def entropy(log_p: Array, axis: int = -1) -> F64:
    """Shannon entropy in nats from log-probabilities; 0 log 0 = 0."""
    p = np.exp(log_p)
    return np.asarray(-(p * np.where(p > 0, log_p, 0.0)).sum(axis))


def probit_scale(variance: Array, temperature: float, strength: float) -> F64:
    """``1 / (T sqrt(1 + pi/8 s v))``, the factor on the logits; v in squared logits.

    MacKay 1992, "The evidence framework applied to classification networks", with one variance a
    row so that the argmax stays; s = 0 is temperature scaling, s = 0 and T = 1 the frozen model.
    """
    v = np.asarray(variance, dtype=np.float64)
    return np.asarray(1.0 / (temperature * np.sqrt(1.0 + PROBIT * strength * v)))


def normal_draws(rank: int, seed: int, draws: int = N_DRAWS) -> F64:
    """Fixed standard normal draws S×R in antithetic pairs, so that their mean is exactly zero."""
    half = np.random.default_rng(seed).standard_normal((draws // 2, rank))
    return np.concatenate([half, -half])


def per_difference(directions: Array) -> F64:
    """Weights R that turn squared amplitudes into the mean over pairs of classes of
    Var(f_c - f_c'), for directions R×C."""
    c = directions.shape[1]
    centred = np.asarray(directions, np.float64)
    centred = centred - centred.mean(1, keepdims=True)
    return np.asarray((centred**2).sum(1) * 2.0 / (c - 1))


def class_variance(spread: Spread) -> F64:
    """Variance N×C of each logit, of the fluctuations."""
    if spread.class_variance is not None:
        return spread.class_variance
    if spread.amplitude is None or spread.directions is None:
        raise FitError("this module gives no variance of single classes; use the probit link")
    g = spread.amplitude**2
    if g.shape[1] == 1:
        return np.asarray(g * (spread.directions**2).sum(0))
    return np.asarray(g @ spread.directions**2)


def deviations(spread: Spread, eps: Array | None) -> F64:
    """Draws N×S×C of the deviation, the shift included. ``eps`` S×R where they are not fixed."""
    if spread.draws is not None:
        found = spread.draws
    else:
        assert spread.amplitude is not None and spread.directions is not None and eps is not None
        found = (spread.amplitude[:, None, :] * eps[None]) @ spread.directions
    return found if spread.shift is None else found + spread.shift[:, None, :]


def drawn_log_probs(
    z: Array, spread: Spread, eps: Array | None, temperature: float, strength: float
) -> F64:
    """Log-probabilities N×S×C of each draw through the calibrated head."""
    centre = np.asarray(z, np.float64)[:, None, :] / temperature
    return log_softmax(centre + math.sqrt(strength) * deviations(spread, eps))


def log_probs(
    z: Array,
    spread: Spread | None,
    temperature: float,
    strength: float,
    predictive: Predictive = "probit",
    eps: Array | None = None,
) -> F64:
    """Log-probabilities N×C of outputs z N×C under a module's spread.

    A mixture is averaged whatever ``predictive`` says. Laplace bridge: Hobbhahn, Kristiadi &
    Hennig 2022, arXiv:2003.01227, after centring over classes; it depends on the ratios of the
    variances only, so that it does not tend to the frozen model as s falls.
    """
    z = np.asarray(z, np.float64)
    if spread is None or strength == 0.0:
        return log_softmax(z / temperature)
    if spread.variance is None or predictive == "mc":
        p = np.exp(drawn_log_probs(z, spread, eps, temperature, strength)).mean(1)
        return np.asarray(np.log(np.maximum(p, np.finfo(np.float64).tiny)))
    centre = z / temperature
    if spread.shift is not None:
        centre = centre + math.sqrt(strength) * spread.shift
    if predictive == "probit":
        return log_softmax(centre * probit_scale(spread.variance, 1.0, strength)[:, None])
    centre = centre - centre.mean(1, keepdims=True)
    v = class_variance(spread)
    if predictive == "probit_class":
        return log_softmax(centre * probit_scale(v, 1.0, strength))
    c = z.shape[1]
    peak = (-centre).max(1, keepdims=True)
    total = np.log(np.exp(-centre - peak).sum(1, keepdims=True)) + peak
    alpha = centre + total - 2 * math.log(c)
    if c > 2:
        alpha = np.logaddexp(alpha, math.log(1 - 2 / c))
    return log_softmax(alpha - np.log(np.maximum(v, np.finfo(np.float64).tiny)))


def decompose(
    z: Array, spread: Spread, eps: Array | None, temperature: float, strength: float
) -> tuple[F64, F64]:
    """(aleatoric, epistemic) in nats, each N, from S draws through the calibrated head.

    aleatoric = mean_s H(p_s); epistemic = H(mean_s p_s) - aleatoric, the mutual information
    (Depeweg et al. 2018, arXiv:1710.07283).
    """
    return decompose_drawn(drawn_log_probs(z, spread, eps, temperature, strength))


def decompose_drawn(log_p: Array) -> tuple[F64, F64]:
    """`decompose` of the draws' log-probabilities N×S×C."""
    aleatoric = entropy(log_p).mean(1)
    mean = np.exp(log_p).mean(1)
    total = entropy(np.log(np.maximum(mean, 1e-38)))
    return np.asarray(aleatoric), np.maximum(total - aleatoric, 0.0)


def join(parts: list[Spread]) -> Spread:
    """The spreads of consecutive blocks as one."""

    def whole(name: str) -> F64 | None:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else np.concatenate(values)

    names = ("variance", "amplitude", "draws", "class_variance", "shift")
    return Spread(directions=parts[0].directions, **{n: whole(n) for n in names})
