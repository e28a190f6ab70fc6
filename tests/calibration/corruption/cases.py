"""Inputs of every kind for the tests of corruptions."""

from __future__ import annotations

import numpy as np

from calibration.corruption import CORRUPTIONS, Kind

EVERY = [(kind, name) for kind, known in CORRUPTIONS.items() for name in known]


def inputs(kind: Kind, n: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """N rows of one kind, several tensors of it by name."""
    rng = np.random.default_rng(seed)
    if kind == "images":
        return {
            "left": rng.normal(size=(n, 3, 12, 10)).astype(np.float32),
            "right": rng.integers(0, 256, (n, 9, 9, 1)).astype(np.uint8),
            "grey": rng.random((n, 8, 11)),
        }
    if kind == "tokens":
        length = rng.integers(5, 20, n)
        mask = (np.arange(20) < length[:, None]).astype(np.int64)
        return {
            "ids": rng.integers(1, 50, (n, 20)) * mask,
            "attention_mask": mask,
        }
    return {
        "a": rng.normal(5, 2, n).astype(np.float32),
        "b": rng.integers(0, 9, n),
        "c": rng.gamma(2, 3, (n, 1)),
        "d": rng.normal(size=(n, 4)).astype(np.float16),
    }
