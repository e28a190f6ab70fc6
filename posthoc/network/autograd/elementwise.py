"""Arithmetic, comparisons and logic, element by element with numpy's broadcasting."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from posthoc.network.autograd.node import Node, Operator, Table, plain


def divide(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Div: integers are cut towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Pow: the result has the type of the base."""
    return torch.pow(a, b).to(a.dtype)


def modulo(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Mod: sign of the divisor, or of the dividend with ``fmod``."""
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip; ``high`` wins where it is below ``low``."""
    if low is None and high is None:
        return x
    return torch.clamp(x, min=low, max=high)


def is_inf(node: Node, x: Tensor) -> Tensor:
    """IsInf, of either sign or of the one that is asked for."""
    positive = torch.isposinf(x) & bool(node.get("detect_positive", 1))
    return positive | (torch.isneginf(x) & bool(node.get("detect_negative", 1)))


def _many(function: str) -> Operator:
    """An operator of any number of inputs."""
    pair = getattr(torch, function)
    return Operator(lambda node, *xs: reduce(pair, xs))


OPERATORS: Table = {
    **{
        kind: plain(getattr(torch, function))
        for kind, function in {
            "Abs": "abs",
            "Acos": "acos",
            "Acosh": "acosh",
            "Add": "add",
            "And": "logical_and",
            "Asin": "asin",
            "Asinh": "asinh",
            "Atan": "atan",
            "Atanh": "atanh",
            "BitwiseAnd": "bitwise_and",
            "BitwiseNot": "bitwise_not",
            "BitwiseOr": "bitwise_or",
            "BitwiseXor": "bitwise_xor",
            "Ceil": "ceil",
            "Cos": "cos",
            "Cosh": "cosh",
            "Equal": "eq",
            "Erf": "erf",
            "Exp": "exp",
            "Floor": "floor",
            "Greater": "gt",
            "GreaterOrEqual": "ge",
            "IsNaN": "isnan",
            "Less": "lt",
            "LessOrEqual": "le",
            "Log": "log",
            "Mul": "mul",
            "Neg": "neg",
            "Not": "logical_not",
            "Or": "logical_or",
            "Reciprocal": "reciprocal",
            "Round": "round",
            "Sign": "sign",
            "Sin": "sin",
            "Sinh": "sinh",
            "Sqrt": "sqrt",
            "Sub": "sub",
            "Tan": "tan",
            "Tanh": "tanh",
            "Where": "where",
            "Xor": "logical_xor",
        }.items()
    },
    "Clip": Operator(clip),
    "Div": Operator(divide),
    "IsInf": Operator(is_inf),
    "Max": _many("maximum"),
    "Mean": Operator(lambda node, *xs: reduce(torch.add, xs) / len(xs)),
    "Min": _many("minimum"),
    "Mod": Operator(modulo),
    "Pow": Operator(power),
    "Sum": _many("add"),
}
