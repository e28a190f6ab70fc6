"""`posthoc.links` as graph fragments: probabilities and their decomposition."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64
from posthoc.links import PROBIT, Predictive, SpreadNames

if TYPE_CHECKING:
    from posthoc.graph import Fragment

TINY = 1e-38


def emit_draws(
    g: Fragment, z: str, spread: SpreadNames, eps: F64 | None, temperature: float, strength: float
) -> tuple[str, str]:
    """(log-probabilities, probabilities) of each draw, N×S×C: `links.drawn_log_probs`."""
    root = math.sqrt(strength)
    if spread.draws is not None:
        dev = g.op("Mul", spread.draws, g.const(root))
    else:
        assert spread.amplitude is not None and spread.directions is not None and eps is not None
        noise = g.op("Mul", g.unsqueeze(spread.amplitude, 1), g.const(eps[None]))
        dev = g.op("MatMul", noise, g.const(spread.directions * root))
    centre = g.unsqueeze(_centre(g, z, spread, temperature, strength), 1)
    log_p = g.op("LogSoftmax", g.op("Add", centre, dev), axis=-1)
    return log_p, g.op("Exp", log_p)


def emit_probs(
    g: Fragment,
    z: str,
    spread: SpreadNames | None,
    temperature: float,
    strength: float,
    predictive: Predictive = "probit",
    drawn: tuple[str, str] | None = None,
    classes: int | None = None,
) -> tuple[str, str]:
    """(log-probabilities, probabilities), each N×C: `links.log_probs`. ``drawn`` is what
    `emit_draws` gave, for a mixture and for the Monte-Carlo link; the bridge needs ``classes``."""
    if spread is None or strength == 0.0:
        return _softmax(g, g.op("Mul", z, g.const(1.0 / temperature)))
    if spread.variance is None or predictive == "mc":
        assert drawn is not None
        p = g.reduce("ReduceMean", drawn[1], 1)
        return g.op("Log", g.op("Max", p, g.const(TINY))), p
    if predictive == "probit" and spread.shift is None:
        # T sqrt(1 + c v) = sqrt(T² + T² c v): one multiply-add instead of two multiplies.
        t2 = temperature**2
        scale = _widen(g, spread.variance, t2 * PROBIT * strength, t2)
        return _softmax(g, g.op("Div", z, scale))
    centre = _centre(g, z, spread, temperature, strength)
    if predictive == "probit":
        scale = _widen(g, spread.variance, PROBIT * strength, 1.0)
        return _softmax(g, g.op("Div", centre, scale))
    centre = g.op("Sub", centre, g.reduce("ReduceMean", centre, 1, keepdims=True))
    v = emit_class_variance(g, spread)
    if predictive == "probit_class":
        return _softmax(g, g.op("Div", centre, _widen(g, v, PROBIT * strength, 1.0)))
    assert classes is not None
    c = classes
    total = _log_sum_exp(g, g.op("Neg", centre))
    alpha = g.op("Sub", g.op("Add", centre, total), g.const(2 * math.log(c)))
    if c > 2:
        floor = g.const(math.log(1 - 2 / c))
        gap = g.op("Neg", g.op("Abs", g.op("Sub", alpha, floor)))
        more = g.op("Log", g.op("Add", g.const(1.0), g.op("Exp", gap)))
        alpha = g.op("Add", g.op("Max", alpha, floor), more)
    return _softmax(g, g.op("Sub", alpha, g.op("Log", g.op("Max", v, g.const(TINY)))))


def emit_decomposition(g: Fragment, drawn: tuple[str, str]) -> tuple[str, str]:
    """(aleatoric, epistemic) tensor names, each N: `links.decompose`."""
    log_p, p = drawn
    # Classes first: one sum over all draws and classes loses 1e-5 where all terms are alike.
    each = g.sum(g.op("Mul", p, log_p), 2)
    aleatoric = g.op("Neg", g.reduce("ReduceMean", each, 1))
    mean = g.reduce("ReduceMean", p, 1)
    log_mean = g.op("Log", g.op("Max", mean, g.const(TINY)))
    total = g.op("Neg", g.sum(g.op("Mul", mean, log_mean), 1))
    return aleatoric, g.op("Max", g.op("Sub", total, aleatoric), g.const(0.0))


def emit_class_variance(g: Fragment, spread: SpreadNames) -> str:
    """`links.class_variance`: N×C."""
    if spread.class_variance is not None:
        return spread.class_variance
    assert spread.amplitude is not None and spread.directions is not None
    squared = g.op("Mul", spread.amplitude, spread.amplitude)
    if spread.equal:
        return g.op("Mul", squared, g.const((spread.directions**2).sum(0)[None]))
    return g.op("MatMul", squared, g.const(np.asarray(spread.directions**2)))


def _centre(g: Fragment, z: str, spread: SpreadNames, temperature: float, strength: float) -> str:
    centre = g.op("Mul", z, g.const(1.0 / temperature))
    if spread.shift is None:
        return centre
    return g.op("Add", centre, g.op("Mul", spread.shift, g.const(math.sqrt(strength))))


def _widen(g: Fragment, variance: str, factor: float, one: float) -> str:
    return g.op("Sqrt", g.op("Add", g.op("Mul", variance, g.const(factor)), g.const(one)))


def _softmax(g: Fragment, z: str) -> tuple[str, str]:
    log_p = g.op("LogSoftmax", z, axis=-1)
    return log_p, g.op("Exp", log_p)


def _log_sum_exp(g: Fragment, x: str) -> str:
    peak = g.reduce("ReduceMax", x, 1, keepdims=True)
    return g.op(
        "Add", g.op("Log", g.sum(g.op("Exp", g.op("Sub", x, peak)), 1, keepdims=True)), peak
    )
