"""How the frozen model's output tensor becomes logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from posthoc.contract import Array, LinearHead

if TYPE_CHECKING:
    from posthoc.graph import Fragment

TINY = 1e-30  # the least probability that a logarithm is taken of

# How the frozen model's tensor becomes logits N×C: as it is, the log of probabilities, or from one
# sigmoid logit (probability) of two classes. Regression is always "identity".
Link = Literal["identity", "log", "sigmoid", "log_sigmoid"]


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
