"""Affine coupling layers (Dinh et al. 2017, arXiv:1605.08803), in numpy with their gradient.

A layer takes x (N×Q), half of whose columns it leaves alone and reads:

    h = tanh(x A + a)        s = tanh(h S + b)        out = x exp(s) + h T + c

with rows of A nought for the other half and columns of S, b, T, c nought for that half, so that the
Jacobian is triangular and its logarithm sum s. tanh bounds s, and h T as well: far away a row is
only moved and stretched by at most e a layer, so that its density falls as that of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc.contract import Array
from posthoc.methods.loss.perceptron import AdamW

PARTS = 6  # A, a, S, b, T, c: what a layer has


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a flow is trained: ``layers`` of ``width`` hidden units, by Adam on mini-batches of
    ``batch`` rows, at most ``steps`` of them, until ``patience`` looks in a row at held-out rows,
    one every ``period`` steps, found none better by ``least`` nats."""

    layers: int = 6
    width: int = 64
    batch: int = 256
    steps: int = 3000
    period: int = 50
    patience: int = 8
    least: float = 1e-3
    rate: float = 2e-3
    decay: float = 1e-2
    seed: int = 0


def start(size: int, recipe: Recipe) -> list[Array]:
    """Parameters in float32 of layers that do nothing yet: S and T are nought."""
    rng = np.random.default_rng(recipe.seed)
    found: list[Array] = []
    for read in _reads(size, recipe.layers):
        a = rng.standard_normal((size, recipe.width)) / np.sqrt(max(1, read.sum()))
        wide, bias = np.zeros((recipe.width, size), np.float32), np.zeros(size, np.float32)
        hidden = [(a * read[:, None]).astype(np.float32), np.zeros(recipe.width, np.float32)]
        found += [*hidden, wide, bias, wide.copy(), bias.copy()]
    return found


def forward(parameters: Sequence[Array], x: Array) -> tuple[Array, Array]:
    """(what the layers make of x N×Q, the logarithm N of their Jacobian)."""
    log = np.zeros(len(x), x.dtype)
    for i in range(0, len(parameters), PARTS):
        a, a0, s, s0, t, t0 = parameters[i : i + PARTS]
        h = np.tanh(x @ a + a0)
        scale = np.tanh(h @ s + s0)
        x = x * np.exp(scale) + h @ t + t0
        log = log + scale.sum(1)
    return x, log


def loss(parameters: Sequence[Array], x: Array) -> float:
    """Mean of minus the logarithm of the density, in nats and without its constant."""
    out, log = forward(parameters, x)
    return float((0.5 * (out * out).sum(1, dtype=np.float64) - log).mean())


def gradients(parameters: Sequence[Array], x: Array) -> list[Array]:
    """The gradient of `loss` by each parameter."""
    seen: list[tuple[Array, Array, Array]] = []
    for i in range(0, len(parameters), PARTS):
        a, a0, s, s0, t, t0 = parameters[i : i + PARTS]
        h = np.tanh(x @ a + a0)
        scale = np.tanh(h @ s + s0)
        seen.append((x, h, scale))
        x = x * np.exp(scale) + h @ t + t0
    n = len(x)
    by_out = x / n
    found: list[Array] = []
    for i in range(len(parameters) - PARTS, -1, -PARTS):
        a, _, s, _, t, _ = parameters[i : i + PARTS]
        x, h, scale = seen[i // PARTS]
        stretched = by_out * np.exp(scale)
        by_scale = (stretched * x - 1 / n) * (1 - scale * scale)
        by_hidden = (by_scale @ s.T + by_out @ t.T) * (1 - h * h)
        layer = [x.T @ by_hidden, by_hidden.sum(0), h.T @ by_scale, by_scale.sum(0)]
        found = [*layer, h.T @ by_out, by_out.sum(0), *found]
        by_out = stretched + by_hidden @ a.T
    return found


def train(x: Array, held: Array, recipe: Recipe) -> tuple[list[Array], int, float]:
    """(parameters, steps taken to them, loss on ``held``) of the best look: rows x N×Q in float32,
    in their order and seeded, so that the same rows give the same flow."""
    size = x.shape[1]
    parameters = start(size, recipe)
    masks = _masks(size, recipe)
    descent = AdamW(parameters, recipe.rate, recipe.decay)
    best, at, value, misses = [p.copy() for p in parameters], 0, loss(parameters, held), 0
    for step, batch in enumerate(_batches(x, recipe), 1):
        found = gradients(parameters, batch)
        descent.step([g * m for g, m in zip(found, masks, strict=True)])
        if step % recipe.period:
            continue
        new, misses = loss(parameters, held), misses + 1
        if new < value - recipe.least:
            best, at, value, misses = [p.copy() for p in parameters], step, new, 0
        if misses == recipe.patience:
            break
    return best, at, value


def _reads(size: int, layers: int) -> list[Array]:
    """Which columns a layer reads: 1 for every other one, then for the others, and so on."""
    return [(np.arange(size) % 2 == i % 2).astype(np.float64) for i in range(layers)]


def _masks(size: int, recipe: Recipe) -> list[Array]:
    """1 for each parameter that may differ from nought."""
    found: list[Array] = []
    for read in _reads(size, recipe.layers):
        read, rest = read.astype(np.float32), (1 - read).astype(np.float32)
        one = np.ones(1, np.float32)
        found += [read[:, None], one, rest[None], rest, rest[None], rest]
    return found


def _batches(x: Array, recipe: Recipe) -> Iterator[Array]:
    """``steps`` mini-batches, epoch after epoch in another order."""
    rng, left = np.random.default_rng(recipe.seed), recipe.steps
    while left:
        order = rng.permutation(len(x))
        for i in range(0, len(x), recipe.batch):
            if left:
                left -= 1
                yield x[order[i : i + recipe.batch]]
