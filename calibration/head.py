"""The calibrated head: module, scaling, conformal sets, OOD flag and abstention as one function.

``reference`` is the definition in float64; ``emit`` writes the same as an ONNX fragment. A bundle
is written only after the two agreed on real rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibration.conformal.cells import UNKNOWN, Cells, group_index
from calibration.conformal.intervals import Interval, bounds, emit_bounds, emit_end
from calibration.conformal.scores import class_scores, emit_class_scores
from calibration.families import Family, apply_family, emit_family
from calibration.ranks import Ranks
from calibration.shift.weighted import Weighted
from calibration.threshold import pvalues
from posthoc import link_graph, links, registry
from posthoc.contract import F64, Array, State, Task

if TYPE_CHECKING:
    from posthoc.graph import Fragment


Prediction = Literal["frozen", "module"]


@dataclass(frozen=True, slots=True)
class Member:
    """A fitted score with its mean and standard deviation on calibration rows, and its ranks among
    them where these are what is averaged."""

    name: str
    state: State
    mean: float = 0.0
    scale: float = 1.0
    ranks: Ranks | None = None


@dataclass(frozen=True, slots=True)
class Ood:
    """The out-of-distribution score: the mean of its members, each in standard deviations of clean
    rows or as its rank among them; a p-value table (thresholds m, p-values m+1) and the flag's
    threshold."""

    members: tuple[Member, ...]
    table: F64
    pvalues: F64
    threshold: float = math.inf

    def score(self, phi: Array | None, z: Array) -> F64:
        """Scores of N rows, larger = stranger (float64 definition)."""
        parts = []
        for m in self.members:
            raw = registry.page(m.name).score(m.state, phi, z)
            parts.append((raw - m.mean) / m.scale if m.ranks is None else m.ranks.of(raw))
        return np.asarray(np.mean(parts, axis=0))

    def emit(self, g: Fragment, phi: str | None, z: str) -> str:
        """The same as a graph fragment."""
        n = len(self.members)
        total: str | None = None
        for m in self.members:
            raw = registry.page(m.name).emit(g, m.state, phi, z)
            if m.ranks is None:
                part = g.op("Mul", g.op("Sub", raw, g.const(m.mean)), g.const(1.0 / (n * m.scale)))
            else:
                part = g.op("Mul", m.ranks.emit(g, raw), g.const(1.0 / n))
            total = part if total is None else g.op("Add", total, part)
        assert total is not None
        return total


@dataclass(frozen=True, slots=True)
class Head:
    """Everything behind (phi, z). ``width`` is C classes or K outputs.

    ``module`` None is temperature (or scale) only. ``noise`` K holds regression noise variances.
    ``prediction`` says whose answer is served: the frozen model's, or the module's.
    """

    task: Task
    width: int
    features: int | None
    module: tuple[str, State] | None
    temperature: float = 1.0
    strength: float = 0.0
    noise: F64 | None = None
    eps: F64 | None = None
    predictive: links.Predictive = "probit"
    prediction: Prediction = "frozen"
    conformal: str = "lac"
    conformal_settings: Mapping[str, Any] = field(default_factory=dict)
    family: Family | None = None  # of probabilities, after temperature and strength
    sureness: Family | None = None  # of two classes: the label is wrong, or right
    interval: Interval = Interval()
    randomised: bool = False
    cells: Cells | Weighted | None = None
    q_hat: float | F64 = math.inf  # with cells one for each class, or group
    quantile_factors: F64 | None = None
    ood: Ood | None = None
    abstain: float | None = None  # answer above it
    abstains: bool = False

    def with_(self, **changes: Any) -> Head:
        """A copy with other values."""
        return replace(self, **changes)

    def spread(self, phi: Array | None, z: Array) -> links.Spread | None:
        """What the module adds, or None without one."""
        if self.module is None:
            return None
        name, state = self.module
        found: links.Spread = registry.page(name).spread(state, phi, z)
        return found


def reference(
    head: Head,
    phi: Array | None,
    z: Array,
    *,
    q_hat: float | Array | None = None,
    group: Array | None = None,
    u: Array | None = None,
) -> dict[str, Array]:
    """Every field that the head gives, for features N×D and outputs N×C, in float64.

    ``group`` and ``u`` N as the graph takes them, where it does.
    """
    z = np.asarray(z, np.float64)
    spread = head.spread(phi, z)
    q = row_thresholds(head, head.q_hat if q_hat is None else q_hat, z, group, phi)
    out = (
        _reference_classes(head, spread, z, q, _or_default(head, u))
        if head.task == "classification"
        else _reference_values(head, spread, z, q)
    )
    if head.ood is not None:
        score = head.ood.score(phi, z)
        out["ood_score"] = score
        out["ood_pvalue"] = pvalues(head.ood.table, head.ood.pvalues, score)
        out["ood"] = score > head.ood.threshold
    return out


def row_thresholds(
    head: Head, q: float | Array, z: Array, group: Array | None, phi: Array | None
) -> F64:
    """Thresholds that broadcast with scores N×C: N×1, or 1×C for classes."""
    found, n = np.asarray(q, np.float64), len(z)
    if head.cells is None:
        return np.broadcast_to(found, n)[:, None]
    if isinstance(head.cells, Weighted):
        if head.cells.by == "covariate":
            return head.cells.of_rows(found[..., 0], z, phi)[:, None]
        return np.atleast_2d(found)
    if head.cells.by != "group":
        return np.atleast_2d(found)
    asked = np.full(n, UNKNOWN) if group is None else group
    return np.asarray(found[group_index(head.cells.of, asked)][:, None])


def _or_default(head: Head, u: Array | None) -> Array | float:
    """What a row's u is where nobody gave one: of a randomised score 0, which makes the set
    larger."""
    if u is not None:
        return u
    return 0.0 if head.randomised else 1.0


def _reference_classes(
    head: Head, spread: links.Spread | None, z: F64, q: Array, u: Array | float
) -> dict[str, Array]:
    log_p = links.log_probs(z, spread, head.temperature, head.strength, head.predictive, head.eps)
    label = (z if head.prediction == "frozen" else log_p).argmax(1)
    if head.family is not None:
        log_p = apply_family(head.family, log_p)
    p = np.exp(log_p)
    confidence = p[np.arange(len(p)), label]
    if head.sureness is not None:
        confidence = np.exp(apply_family(head.sureness, right_or_wrong(p, label)))[:, 1]
    out: dict[str, Array] = {
        "label": label,
        "probs": p,
        "confidence": confidence,
        "entropy": links.entropy(log_p),
    }
    if spread is not None and spread.decomposes:
        drawn = links.drawn_log_probs(z, spread, head.eps, head.temperature, head.strength)
        if head.family is not None:
            drawn = apply_family(head.family, drawn)
        out["aleatoric"], out["epistemic"] = links.decompose_drawn(drawn)
    scores = class_scores(head.conformal, head.conformal_settings, p, u)
    out["set_scores"] = scores
    out["set_thresholds"] = q
    out["set"] = scores <= q
    out["set_size"] = out["set"].sum(1)
    if head.abstains:
        out["abstain"] = ~(out["confidence"] > limit(head.abstain))
    return out


def _reference_values(head: Head, spread: links.Spread | None, z: F64, q: F64) -> dict[str, Array]:
    assert head.noise is not None
    f2 = head.temperature**2
    aleatoric = np.broadcast_to(f2 * head.noise, z.shape)
    mean, total = z, aleatoric
    out: dict[str, Array] = {}
    if spread is not None:
        assert spread.variance is not None
        epistemic = f2 * head.strength * spread.variance
        if spread.decomposes:
            out["aleatoric_std"], out["epistemic_std"] = np.sqrt(aleatoric), np.sqrt(epistemic)
        total = aleatoric + epistemic
        if spread.shift is not None and head.prediction == "module":
            mean = z + math.sqrt(head.strength) * spread.shift
    std = np.sqrt(total)
    lower, upper = bounds(head.interval, q, mean, std)
    out |= {"mean": mean, "std": std, "lower": lower, "upper": upper}
    if head.quantile_factors is not None:
        out["quantiles"] = mean[:, :, None] + std[:, :, None] * head.quantile_factors[None]
    if head.abstains:
        out["abstain"] = ~(-std.max(1) > limit(head.abstain))
    return out


def emit(
    head: Head,
    g: Fragment,
    phi: str | None,
    z: str,
    *,
    scores: bool = False,
    per_row: Callable[[str], str] = lambda name: name,
) -> dict[str, str]:
    """Write the head into ``g``; field -> tensor name. ``scores`` adds ``set_scores``. ``per_row``
    turns a run-time input [R] into one that rows of z can be held against."""
    names: SpreadNames | None = None
    if head.module is not None:
        name, state = head.module
        names = registry.page(name).emit(g, state, phi, z)
    q = _emit_thresholds(head, g, per_row, phi, z)
    out = (
        _emit_classes(head, g, names, z, q, _emit_u(head, g, per_row))
        if head.task == "classification"
        else _emit_values(head, g, names, z, q)
    )
    if head.ood is not None:
        from posthoc.graph import emit_count_below

        score = head.ood.emit(g, phi, z)
        threshold = per_row(g.optional_input("ood_threshold", head.ood.threshold, "R"))
        index = g.cast(emit_count_below(g, head.ood.table, score), "int64")
        out["ood_score"] = score
        out["ood_pvalue"] = g.op("Gather", g.const(head.ood.pvalues), index, axis=0)
        out["ood"] = g.op("Greater", score, threshold)
    if not scores:
        out.pop("set_scores", None)
    return out


def _emit_thresholds(
    head: Head, g: Fragment, per_row: Callable[[str], str], phi: str | None, z: str
) -> str:
    """`row_thresholds`: the run-time inputs q_hat and, by group, group."""
    q = g.optional_input("q_hat", head.q_hat, "R")
    if head.cells is None:
        return g.unsqueeze(per_row(q), 1)
    if isinstance(head.cells, Weighted):
        if head.cells.by == "target":
            return q
        level = g.op("Squeeze", q, g.const([1], "int64"))
        return g.unsqueeze(head.cells.emit_of_rows(g, level, z, phi), 1)
    if head.cells.by != "group":
        return q
    group = g.unsqueeze(g.optional_input("group", UNKNOWN, "G", "int64"), 1)
    own = g.op("Equal", group, g.const(head.cells.of[None], "int64"))
    rest = g.op(
        "Not", g.cast(g.reduce("ReduceMax", g.cast(own, "float32"), 1, keepdims=True), "bool")
    )
    mine = g.op("Concat", own, rest, axis=1)
    lowest = g.const(float(np.finfo(np.float32).min))
    return g.reduce("ReduceMax", g.op("Where", mine, q, lowest), 1, keepdims=True)


def _emit_u(head: Head, g: Fragment, per_row: Callable[[str], str]) -> str | None:
    """The run-time input u of a randomised score."""
    return per_row(g.optional_input("u", 0.0, "U")) if head.randomised else None


SpreadNames = links.SpreadNames


def _emit_classes(
    head: Head, g: Fragment, names: SpreadNames | None, z: str, q: str, u: str | None
) -> dict[str, str]:
    t, s = head.temperature, head.strength
    drawn = None
    if names is not None and names.decomposes:
        drawn = link_graph.emit_draws(g, z, names, head.eps, t, s)
    log_p, p = link_graph.emit_probs(g, z, names, t, s, head.predictive, drawn, head.width)
    own = head.prediction == "module"
    label = top = g.op("ArgMax", p if own else z, axis=1, keepdims=0)
    if head.family is not None:  # it may name another class, the label stays
        log_p, p = emit_family(head.family, g, log_p)
        drawn = None if drawn is None else emit_family(head.family, g, drawn[0])
    kept = own or names is None or (head.predictive == "probit" and names.keeps_argmax)
    if kept and head.family is None:
        confidence = g.reduce("ReduceMax", p, 1)  # of the label too, and cheaper than picking it
    else:
        chosen = g.op("GatherElements", p, g.unsqueeze(label, 1), axis=1)
        confidence = g.op("Squeeze", chosen, g.const([1], "int64"))
        top = g.op("ArgMax", p, axis=1, keepdims=0)  # under such a link it may be another class
    if head.sureness is not None:
        confidence = _emit_sureness(head.sureness, g, p, label, confidence, head.width)
    out = {
        "label": label,
        "probs": p,
        "confidence": confidence,
        "entropy": g.op("Neg", g.sum(g.op("Mul", p, log_p), 1)),
    }
    if drawn is not None:
        out["aleatoric"], out["epistemic"] = link_graph.emit_decomposition(g, drawn)
    score = emit_class_scores(g, head.conformal, head.conformal_settings, p, top, head.width, u)
    out["set_scores"] = score
    out["set"] = g.op("LessOrEqual", score, q)
    out["set_size"] = g.sum(g.cast(out["set"], "int64"), 1)
    if head.abstains:
        answered = g.op("Greater", out["confidence"], g.const(limit(head.abstain)))
        out["abstain"] = g.op("Not", answered)
    return out


def right_or_wrong(p: Array, label: Array) -> F64:
    """Log-probabilities N×2 that the label is wrong, and right. Wrong is the sum of the others,
    which float32 keeps where a row is nearly sure."""
    p, rows = np.asarray(p, np.float64), np.arange(len(p))
    others = p.copy()
    others[rows, label] = 0.0
    both = np.stack([others.sum(1), p[rows, label]], axis=1)
    return np.asarray(np.log(np.maximum(both, link_graph.TINY)))


def _emit_sureness(
    family: Family, g: Fragment, p: str, label: str, confidence: str, classes: int
) -> str:
    """The confidence N of a family over `right_or_wrong`."""
    here = g.op("Equal", g.unsqueeze(label, 1), g.const(range(classes), "int64"))
    wrong = g.sum(g.op("Where", here, g.const(0.0), p), 1, keepdims=True)
    both = g.op("Concat", wrong, g.unsqueeze(confidence, 1), axis=1)
    _, made = emit_family(family, g, g.op("Log", g.op("Max", both, g.const(link_graph.TINY))))
    right = g.op("Gather", made, g.const([1], "int64"), axis=1)
    return g.op("Squeeze", right, g.const([1], "int64"))


def _emit_values(
    head: Head, g: Fragment, names: SpreadNames | None, z: str, q: str
) -> dict[str, str]:
    assert head.noise is not None
    f2 = head.temperature**2
    noise = g.const((f2 * head.noise)[None])
    zeros = g.op("Mul", z, g.const(0.0))
    total = g.op("Add", zeros, noise)
    mean = g.op("Identity", z)
    out = {}
    if names is not None:
        assert names.variance is not None
        epistemic = g.op("Mul", names.variance, g.const(f2 * head.strength))
        if names.decomposes:
            out["aleatoric_std"] = g.op("Sqrt", total)
            out["epistemic_std"] = g.op("Sqrt", epistemic)
        total = g.op("Add", total, epistemic)
        if names.shift is not None and head.prediction == "module":
            move = g.op("Mul", names.shift, g.const(math.sqrt(head.strength)))
            mean = g.op("Add", z, move)
    std = g.op("Sqrt", total)
    lower, upper = emit_bounds(head.interval, g, q, mean, std)
    out |= {"mean": mean, "std": std, "lower": lower, "upper": upper}
    if head.quantile_factors is not None:
        step = g.op("Mul", g.unsqueeze(std, 2), g.const(head.quantile_factors[None]))
        out["quantiles"] = emit_end(g, g.unsqueeze(mean, 2), step)
    if head.abstains:
        surest = g.op("Neg", g.reduce("ReduceMax", std, 1))
        out["abstain"] = g.op("Not", g.op("Greater", surest, g.const(limit(head.abstain))))
    return out


def limit(threshold: float | None) -> float:
    """None: nothing is confident enough to answer."""
    return math.inf if threshold is None else threshold
