"""A small network of rectified layers in numpy, its gradient written out, and AdamW.

It stands detached beside the frozen network: its inputs are cached, nothing flows back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from posthoc.contract import Array

BETAS, TINY = (0.9, 0.999), 1e-8


def start(sizes: Sequence[int], rng: np.random.Generator) -> list[Array]:
    """Weights and biases [W0, b0, W1, b1, …] in float32, W_i sizes[i]×sizes[i+1] after He et al.
    2015; the last layer is zero, so that the network starts as the constant 0."""
    parameters: list[Array] = []
    pairs = list(pairwise(sizes))
    for n_in, n_out in pairs[:-1]:
        weight = rng.standard_normal((n_in, n_out)) * np.sqrt(2.0 / n_in)
        parameters += [weight.astype(np.float32), np.zeros(n_out, np.float32)]
    return [*parameters, np.zeros(pairs[-1], np.float32), np.zeros(pairs[-1][1], np.float32)]


def forward(parameters: Sequence[Array], x: Array) -> list[Array]:
    """The input of every layer, x N×J first, and at the end the output N×K."""
    layers = [x]
    last = len(parameters) - 2
    for i in range(0, len(parameters), 2):
        out = layers[-1] @ parameters[i] + parameters[i + 1]
        layers.append(out if i == last else np.maximum(out, 0.0))
    return layers


def backward(parameters: Sequence[Array], layers: Sequence[Array], gradient: Array) -> list[Array]:
    """The gradient by each parameter, for the gradient N×K by the output and what `forward`
    gave."""
    found: list[Array] = []
    for i in range(len(parameters) - 2, -1, -2):
        below = layers[i // 2]
        found = [below.T @ gradient, gradient.sum(0), *found]
        if i:
            gradient = (gradient @ parameters[i].T) * (below > 0)
    return found


class AdamW:
    """Descent on arrays in place, with decoupled decay of the weight matrices (Loshchilov & Hutter
    2019, arXiv:1711.05101)."""

    def __init__(self, parameters: list[Array], learning_rate: float, weight_decay: float):
        self.parameters, self.rate, self.decay = parameters, learning_rate, weight_decay
        self._steps = 0
        self._first = [np.zeros_like(p) for p in parameters]
        self._second = [np.zeros_like(p) for p in parameters]

    def step(self, gradients: Sequence[Array]) -> None:
        """One step against the gradients."""
        a, b = BETAS
        self._steps += 1
        rate, unbias = self.rate / (1 - a**self._steps), 1 / (1 - b**self._steps)
        moments = zip(self.parameters, gradients, self._first, self._second, strict=True)
        for parameter, gradient, first, second in moments:
            first += (1 - a) * (gradient - first)
            second += (1 - b) * (gradient**2 - second)
            if parameter.ndim == 2:
                parameter *= 1 - self.rate * self.decay
            parameter -= rate * first / (np.sqrt(second * unbias) + TINY)
