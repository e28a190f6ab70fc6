"""Gaussian logits to probabilities, and total uncertainty = aleatoric + epistemic.

A module describes what it adds to the frozen outputs as a ``Spread``. The functions here turn a
spread into probabilities and their decomposition: in float64 as the definition, and as a graph
fragment that is checked against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from posthoc.contract import F64, Array, LinearHead
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment

PROBIT = math.pi / 8
TINY = 1e-30  # the least probability that a logarithm is taken of

# How the frozen model's tensor becomes logits N×C: as it is, the log of probabilities, or from one
# sigmoid logit (probability) of two classes. Regression is always "identity".
Link = Literal["identity", "log", "sigmoid", "log_sigmoid"]
N_DRAWS = 16


@dataclass(frozen=True, slots=True)
class Spread:
    """Gaussian deviation of the outputs: ``(amplitude * eps) @ directions`` with eps ~ N(0, I).

    variance: N×K (regression), or N for classification: the mean variance of the difference of two
    logits, which is what moves probabilities (for two classes exactly the probit's); amplitude
    N×R; directions R×C.
    """

    variance: F64
    amplitude: F64
    directions: F64


@dataclass(frozen=True, slots=True)
class SpreadNames:
    """The same three as tensor names of a fragment; variance is N×1 or N×K."""

    variance: str
    amplitude: str
    directions: F64


def to_logits(z: Array, link: Link) -> Array:
    """The frozen tensor N×C (N×1 for the sigmoid links) as logits, in its own dtype."""
    if link == "identity":
        return z
    if link == "sigmoid":
        return np.concatenate([np.zeros_like(z), z], 1)
    p = np.concatenate([1 - z, z], 1) if link == "log_sigmoid" else z
    return np.asarray(np.log(np.maximum(p, np.asarray(TINY, p.dtype))))


def two_class_head(head: LinearHead) -> LinearHead:
    """The head of one sigmoid logit as a head of two logits, the first always zero."""
    weight = np.concatenate([np.zeros_like(head.weight), head.weight])
    return LinearHead(weight, np.concatenate([np.zeros_like(head.bias), head.bias]))


def emit_link(g: Fragment, z: str, link: Link) -> str:
    """`to_logits` as a graph fragment."""
    if link == "identity":
        return z
    if link == "sigmoid":
        return g.op("Concat", g.op("Mul", z, g.const(0.0)), z, axis=1)
    if link == "log_sigmoid":
        z = g.op("Concat", g.op("Sub", g.const(1.0), z), z, axis=1)
    return g.op("Log", g.op("Max", z, g.const(TINY)))


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


def decompose(
    z: Array, spread: Spread, eps: Array, temperature: float, strength: float
) -> tuple[F64, F64]:
    """(aleatoric, epistemic) in nats, each N, from S draws through the calibrated head: logits
    ``z / T + sqrt(s) deviation``, whose variance is what `probit_scale` averages over.

    aleatoric = mean_s H(p_s); epistemic = H(mean_s p_s) - aleatoric, the mutual information
    (Depeweg et al. 2018, arXiv:1710.07283).
    """
    dev = (spread.amplitude[:, None, :] * eps[None]) @ spread.directions
    log_p = log_softmax(
        np.asarray(z, np.float64)[:, None, :] / temperature + math.sqrt(strength) * dev
    )
    aleatoric = entropy(log_p).mean(1)
    mean = np.exp(log_p).mean(1)
    total = entropy(np.log(np.maximum(mean, 1e-38)))
    return np.asarray(aleatoric), np.maximum(total - aleatoric, 0.0)


def emit_probs(
    g: Fragment, z: str, variance: str | None, temperature: float, strength: float
) -> tuple[str, str]:
    """(log-probabilities, probabilities), each N×C; ``variance`` N×1 or None."""
    if variance is None or strength == 0.0:
        scaled = g.op("Mul", z, g.const(1.0 / temperature))
    else:
        # T sqrt(1 + c v) = sqrt(T² + T² c v): one multiply-add instead of two multiplies.
        t2 = temperature**2
        inner = g.op("Add", g.op("Mul", variance, g.const(t2 * PROBIT * strength)), g.const(t2))
        scaled = g.op("Div", z, g.op("Sqrt", inner))
    log_p = g.op("LogSoftmax", scaled, axis=-1)
    return log_p, g.op("Exp", log_p)


def emit_decomposition(
    g: Fragment, z: str, spread: SpreadNames, eps: F64, temperature: float, strength: float
) -> tuple[str, str]:
    """(aleatoric, epistemic) tensor names, each N."""
    draws = len(eps)
    noise = g.op("Mul", g.unsqueeze(spread.amplitude, 1), g.const(eps[None]))
    dev = g.op("MatMul", noise, g.const(spread.directions * math.sqrt(strength)))
    centre = g.unsqueeze(g.op("Mul", z, g.const(1.0 / temperature)), 1)
    log_p = g.op("LogSoftmax", g.op("Add", centre, dev), axis=-1)
    p = g.op("Exp", log_p)
    plogp = g.sum(g.op("Mul", p, log_p), 1, 2)
    aleatoric = g.op("Mul", plogp, g.const(-1.0 / draws))
    mean = g.reduce("ReduceMean", p, 1)
    log_mean = g.op("Log", g.op("Max", mean, g.const(1e-38)))
    total = g.op("Neg", g.sum(g.op("Mul", mean, log_mean), 1))
    return aleatoric, g.op("Max", g.op("Sub", total, aleatoric), g.const(0.0))
