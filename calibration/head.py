"""The calibrated head: module, scaling, conformal sets, OOD flag and abstention as one function.

``reference`` is the definition in float64; ``emit`` writes the same as an ONNX fragment. A bundle
is written only after the two agreed on real rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.conformal.scores import class_scores, emit_class_scores
from calibration.threshold import pvalues
from posthoc import links, registry
from posthoc.contract import F64, Array, State, Task
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment


@dataclass(frozen=True, slots=True)
class Member:
    """A fitted score with its mean and standard deviation on calibration rows."""

    name: str
    state: State
    mean: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Ood:
    """The out-of-distribution score: the mean of its members, each in standard deviations of clean
    rows; a p-value table (thresholds m, p-values m+1) and the flag's threshold."""

    members: tuple[Member, ...]
    table: F64
    pvalues: F64
    threshold: float = math.inf

    def score(self, phi: Array | None, z: Array) -> F64:
        """Scores of N rows, larger = stranger (float64 definition)."""
        parts = [
            (registry.page(m.name).score(m.state, phi, z) - m.mean) / m.scale for m in self.members
        ]
        return np.asarray(np.mean(parts, axis=0))

    def emit(self, g: Fragment, phi: str | None, z: str) -> str:
        """The same as a graph fragment."""
        n = len(self.members)
        total: str | None = None
        for m in self.members:
            raw = registry.page(m.name).emit(g, m.state, phi, z)
            part = g.op("Mul", g.op("Sub", raw, g.const(m.mean)), g.const(1.0 / (n * m.scale)))
            total = part if total is None else g.op("Add", total, part)
        assert total is not None
        return total


@dataclass(frozen=True, slots=True)
class Head:
    """Everything behind (phi, z). ``width`` is C classes or K outputs.

    ``module`` None is temperature (or scale) only. ``noise`` K holds regression noise variances.
    """

    task: Task
    width: int
    features: int | None
    module: tuple[str, State] | None
    temperature: float = 1.0
    strength: float = 0.0
    noise: F64 | None = None
    eps: F64 | None = None
    conformal: str = "lac"
    conformal_settings: Mapping[str, Any] = field(default_factory=dict)
    q_hat: float = math.inf
    quantile_factors: F64 | None = None
    ood: Ood | None = None
    abstain: float | None = None  # answer above it
    abstains: bool = False

    def with_(self, **changes: Any) -> Head:
        """A copy with other values."""
        return replace(self, **changes)

    def spread(self, phi: Array | None) -> links.Spread | None:
        """What the module adds, or None without one."""
        if self.module is None:
            return None
        name, state = self.module
        found: links.Spread = registry.page(name).spread(state, phi)
        return found


def reference(
    head: Head,
    phi: Array | None,
    z: Array,
    *,
    q_hat: float | None = None,
) -> dict[str, Array]:
    """Every field that the head gives, for features N×D and outputs N×C, in float64."""
    z = np.asarray(z, np.float64)
    spread = head.spread(phi)
    q = head.q_hat if q_hat is None else q_hat
    out = (
        _reference_classes(head, spread, z, q)
        if head.task == "classification"
        else _reference_values(head, spread, z, q)
    )
    if head.ood is not None:
        score = head.ood.score(phi, z)
        out["ood_score"] = score
        out["ood_pvalue"] = pvalues(head.ood.table, head.ood.pvalues, score)
        out["ood"] = score > head.ood.threshold
    return out


def _reference_classes(
    head: Head, spread: links.Spread | None, z: F64, q: float
) -> dict[str, Array]:
    variance = np.zeros(len(z)) if spread is None else spread.variance
    scale = links.probit_scale(variance, head.temperature, head.strength)
    log_p = log_softmax(z * scale[:, None])
    p = np.exp(log_p)
    out: dict[str, Array] = {
        "label": z.argmax(1),
        "probs": p,
        "confidence": p.max(1),
        "entropy": links.entropy(log_p),
    }
    if spread is not None and head.eps is not None:
        out["aleatoric"], out["epistemic"] = links.decompose(
            z, spread, head.eps, head.temperature, head.strength
        )
    scores = class_scores(head.conformal, head.conformal_settings, p)
    out["set_scores"] = scores
    out["set"] = scores <= q
    out["set_size"] = out["set"].sum(1)
    if head.abstains:
        out["abstain"] = ~(out["confidence"] > limit(head.abstain))
    return out


def _reference_values(
    head: Head, spread: links.Spread | None, z: F64, q: float
) -> dict[str, Array]:
    assert head.noise is not None
    f2 = head.temperature**2
    aleatoric = np.broadcast_to(f2 * head.noise, z.shape)
    out: dict[str, Array] = {"mean": z}
    total = aleatoric
    if spread is not None:
        epistemic = f2 * head.strength * spread.variance
        out["aleatoric_std"], out["epistemic_std"] = np.sqrt(aleatoric), np.sqrt(epistemic)
        total = aleatoric + epistemic
    std = np.sqrt(total)
    out |= {"std": std, "lower": z - q * std, "upper": z + q * std}
    if head.quantile_factors is not None:
        out["quantiles"] = z[:, :, None] + std[:, :, None] * head.quantile_factors[None]
    if head.abstains:
        out["abstain"] = ~(-std.max(1) > limit(head.abstain))
    return out


def emit(
    head: Head, g: Fragment, phi: str | None, z: str, *, scores: bool = False
) -> dict[str, str]:
    """Write the head into ``g``; field -> tensor name. ``scores`` adds ``set_scores``."""
    names: SpreadNames | None = None
    if head.module is not None:
        name, state = head.module
        names = registry.page(name).emit(g, state, phi)
    q = g.unsqueeze(g.optional_input("q_hat", head.q_hat, "R"), 1)
    out = (
        _emit_classes(head, g, names, z, q)
        if head.task == "classification"
        else _emit_values(head, g, names, z, q)
    )
    if head.ood is not None:
        score = head.ood.emit(g, phi, z)
        threshold = g.optional_input("ood_threshold", head.ood.threshold, "R")
        below = g.op("Less", g.const(head.ood.table[None]), g.unsqueeze(score, 1))
        # Counted in float32, which is exact up to 2**24 and far faster than an integer sum.
        index = g.cast(g.sum(g.cast(below, "float32"), 1), "int64")
        out["ood_score"] = score
        out["ood_pvalue"] = g.op("Gather", g.const(head.ood.pvalues), index, axis=0)
        out["ood"] = g.op("Greater", score, threshold)
    if not scores:
        out.pop("set_scores", None)
    return out


SpreadNames = links.SpreadNames


def _emit_classes(
    head: Head, g: Fragment, names: SpreadNames | None, z: str, q: str
) -> dict[str, str]:
    variance = None if names is None else names.variance
    log_p, p = links.emit_probs(g, z, variance, head.temperature, head.strength)
    label = g.op("ArgMax", z, axis=1, keepdims=0)
    out = {
        "label": label,
        "probs": p,
        "confidence": g.reduce("ReduceMax", p, 1),
        "entropy": g.op("Neg", g.sum(g.op("Mul", p, log_p), 1)),
    }
    if names is not None and head.eps is not None:
        out["aleatoric"], out["epistemic"] = links.emit_decomposition(
            g, z, names, head.eps, head.temperature, head.strength
        )
    score = emit_class_scores(g, head.conformal, head.conformal_settings, p, label, head.width)
    out["set_scores"] = score
    out["set"] = g.op("LessOrEqual", score, q)
    out["set_size"] = g.sum(g.cast(out["set"], "int64"), 1)
    if head.abstains:
        answered = g.op("Greater", out["confidence"], g.const(limit(head.abstain)))
        out["abstain"] = g.op("Not", answered)
    return out


def _emit_values(
    head: Head, g: Fragment, names: SpreadNames | None, z: str, q: str
) -> dict[str, str]:
    assert head.noise is not None
    f2 = head.temperature**2
    noise = g.const((f2 * head.noise)[None])
    zeros = g.op("Mul", z, g.const(0.0))
    total = g.op("Add", zeros, noise)
    out = {"mean": g.op("Identity", z)}
    if names is not None:
        epistemic = g.op("Mul", names.variance, g.const(f2 * head.strength))
        out["aleatoric_std"] = g.op("Sqrt", total)
        out["epistemic_std"] = g.op("Sqrt", epistemic)
        total = g.op("Add", total, epistemic)
    std = g.op("Sqrt", total)
    half = g.op("Mul", q, std)
    out |= {"std": std, "lower": g.op("Sub", z, half), "upper": g.op("Add", z, half)}
    if head.quantile_factors is not None:
        step = g.op("Mul", g.unsqueeze(std, 2), g.const(head.quantile_factors[None]))
        out["quantiles"] = g.op("Add", g.unsqueeze(z, 2), step)
    if head.abstains:
        surest = g.op("Neg", g.reduce("ReduceMax", std, 1))
        out["abstain"] = g.op("Not", g.op("Greater", surest, g.const(limit(head.abstain))))
    return out


def limit(threshold: float | None) -> float:
    """None: nothing is confident enough to answer."""
    return math.inf if threshold is None else threshold
