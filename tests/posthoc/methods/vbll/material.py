"""Cached rows whose labels come from another head than the frozen one."""

from __future__ import annotations

import numpy as np

from posthoc.contract import Features, LinearHead
from posthoc.folds import log_softmax


def classes(n: int = 400, d: int = 6, c: int = 3, seed: int = 0) -> tuple[LinearHead, Features]:
    """(frozen head, rows) with features far from standard and labels drawn from a moved head."""
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(c, d)), rng.normal(size=c))
    moved = head.weight + 0.7 * rng.normal(size=(c, d))
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    x = rng.normal(size=(n, d)) @ mix
    phi = x * np.linspace(0.5, 3.0, d) + np.linspace(-4.0, 4.0, d)
    z = x @ head.weight.T + head.bias
    noise = rng.gumbel(size=z.shape)
    return head, Features(phi, z, (x @ moved.T + head.bias + noise).argmax(1))


def targets(n: int = 200, d: int = 5, k: int = 2, seed: int = 0) -> tuple[LinearHead, Features]:
    """(frozen head, rows) with targets from a moved head, noise of other variance an output."""
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(k, d)), rng.normal(size=k))
    x = rng.normal(size=(n, d)) @ (np.eye(d) + 0.4 * rng.normal(size=(d, d)))
    phi = x * np.linspace(0.5, 3.0, d) + np.linspace(-4.0, 4.0, d)
    z = phi @ head.weight.T + head.bias
    deviation = x @ (0.6 * rng.normal(size=(d, k))) * np.linspace(1.0, 20.0, k)
    noise = rng.normal(size=z.shape) * np.linspace(0.5, 8.0, k)
    return head, Features(phi, z, z + deviation + noise)


def mean_nll(logits: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_softmax(logits)[np.arange(len(y)), y].mean())
