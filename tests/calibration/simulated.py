"""Simulated test rows whose truth is drawn from known probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from calibration.bundle import threshold_at
from calibration.evaluation import Evaluation, evaluate_classification, evaluate_regression
from calibration.evaluation.parts import Places
from posthoc.contract import F64, I64


def softmax(z: F64) -> F64:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p: F64 = e / e.sum(axis=1, keepdims=True)
    return p


def classes(n: int, c: int, seed: int, signal: float = 3.0) -> tuple[F64, I64]:
    """Logits z (n×c) and classes y drawn from softmax(z): a perfectly calibrated model."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, c))
    z[np.arange(n), rng.integers(0, c, n)] += signal * rng.gamma(2.0, 1.0, n)
    p = softmax(z)
    y = (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return z, y


def classification(n: int = 2000, c: int = 6, seed: int = 0, **more: Any) -> Evaluation:
    """An over-confident frozen model, temperature scaling that nearly mends it, and hedged."""
    z, y = classes(2 * n, c, seed)
    p = softmax(z)
    conformal = np.sort(1 - p[:n][np.arange(n), y[:n]])
    z, y, p = z[n:], y[n:], p[n:]
    label = p.argmax(axis=1)
    rng = np.random.default_rng(seed + 1)
    strange = softmax(0.5 * rng.standard_normal((n // 2, c)))
    entropy, out_entropy = (-(q * np.log(q)).sum(axis=1) for q in (p, strange))
    scores = {"hedged": entropy, "msp": 1 - p.max(axis=1)}
    arguments: dict[str, Any] = {
        "frozen_probs": softmax(2.5 * z),
        "scaled_probs": softmax(1.1 * z),
        "fields": {
            "label": label,
            "probs": p,
            "confidence": p[np.arange(n), label],
            "abstain": p.max(axis=1) < 0.4,
        },
        "y": y,
        "sets": {a: 1 - p <= threshold_at(conformal, a) for a in (0.1, 0.05, 0.2, 0.01)},
        "n_conformal": n,
        "ood_in": scores,
        "ood_out": {
            "flat": {"hedged": out_entropy, "msp": 1 - strange.max(axis=1)},
            "half": {"hedged": entropy[: n // 3] + 0.5, "msp": scores["msp"][: n // 3] + 0.1},
        },
        "ood_doubts": {"flat": strange.max(axis=1), "half": p.max(axis=1)[: n // 3]},
        "places": Places(np.arange(n) + 7),
        "about": {"model": "simulated & calibrated <softmax>", "bundle": "0123abcd" * 8},
        "n_boot": 200,
    }
    return evaluate_classification(**(arguments | more))


def regression(n: int = 2000, k: int = 1, seed: int = 0, **more: Any) -> Evaluation:
    """Gaussian targets whose standard deviation varies and is known."""
    rng = np.random.default_rng(seed)
    std = rng.gamma(3.0, 0.5, (2 * n, k))
    mean = rng.normal(0, 10, (2 * n, k))
    y = mean + std * rng.standard_normal((2 * n, k))
    scores = np.sort((np.abs(y - mean) / std)[:n].max(axis=1))
    mean, std, y = mean[n:], std[n:], y[n:]
    reach = {a: threshold_at(scores, a) * std for a in (0.1, 0.05)}
    levels = (0.1, 0.25, 0.5, 0.75, 0.9)
    normal = np.array([-1.2815515655446, -0.6744897501961, 0, 0.6744897501961, 1.2815515655446])
    arguments: dict[str, Any] = {
        "fields": {
            "mean": mean,
            "std": std,
            "quantiles": mean[..., None] + std[..., None] * normal,
        },
        "constant_std": (y - mean).std(axis=0),
        "y": y,
        "intervals": {a: (mean - r, mean + r) for a, r in reach.items()},
        "n_conformal": n,
        "quantile_levels": levels,
        "ood_in": {"rmds": rng.chisquare(5, n)},
        "ood_out": {"far": {"rmds": rng.chisquare(5, n // 2) + 8}},
        "ood_doubts": {"far": 3 * std[: n // 2]},
        "places": Places(np.arange(n), np.array([f"id {i}" for i in range(n)])),
        "n_boot": 200,
    }
    return evaluate_regression(**(arguments | more))
