"""Activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from posthoc.network.autograd.node import Node, Operator, Table, plain

# Beyond this softplus is its argument to the last bit of float64 (torch's 20 is for float32).
_LINEAR = 40.0


def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """LeakyRelu."""
    return functional.leaky_relu(x, node.get("alpha", 0.01))


def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """PRelu, whose slope broadcasts to x as in numpy (torch's is per channel)."""
    return torch.where(x < 0, slope * x, x)


def elu(node: Node, x: Tensor) -> Tensor:
    """Elu."""
    return functional.elu(x, node.get("alpha", 1.0))


def selu(node: Node, x: Tensor) -> Tensor:
    """Selu, whose two constants are attributes."""
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return torch.mul(functional.elu(x, alpha), gamma)


def celu(node: Node, x: Tensor) -> Tensor:
    """Celu."""
    return functional.celu(x, node.get("alpha", 1.0))


def gelu(node: Node, x: Tensor) -> Tensor:
    """Gelu by the error function, or by its approximation with tanh."""
    return functional.gelu(x, approximate=node.get("approximate", "none"))


def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """HardSigmoid: max(0, min(1, alpha x + beta))."""
    return torch.clamp(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    """ThresholdedRelu: x above alpha, else 0."""
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


def swish(node: Node, x: Tensor) -> Tensor:
    """Swish: x times the sigmoid of alpha x."""
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


OPERATORS: Table = {
    "Celu": Operator(celu),
    "Elu": Operator(elu),
    "Gelu": Operator(gelu),
    "HardSigmoid": Operator(hard_sigmoid),
    "HardSwish": plain(lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1)),
    "LeakyRelu": Operator(leaky_relu),
    "LogSoftmax": Operator(lambda node, x: torch.log_softmax(x, node.get("axis", -1))),
    "Mish": plain(lambda x: x * torch.tanh(functional.softplus(x, threshold=_LINEAR))),
    "PRelu": Operator(prelu),
    "Relu": plain(torch.relu),
    "Selu": Operator(selu),
    "Sigmoid": plain(torch.sigmoid),
    "Softmax": Operator(lambda node, x: torch.softmax(x, node.get("axis", -1))),
    "Softplus": plain(lambda x: functional.softplus(x, threshold=_LINEAR)),
    "Softsign": plain(functional.softsign),
    "Swish": Operator(swish),
    "ThresholdedRelu": Operator(thresholded_relu),
}
