"""Cached rows of a made-up frozen head, and what the real fit makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import Fitted
from calibration.head import Head
from posthoc.contract import Features, LinearHead, Task

D = 12


def linear(width: int, seed: int = 0) -> LinearHead:
    """A head of ``width`` outputs over 12 features."""
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(width, D)), rng.normal(size=width))


def rows(head: LinearHead, task: Task, n: int, seed: int, temperature: float = 2.0) -> Features:
    """N rows: classes drawn at a temperature, or targets with noise of standard deviation 0.5."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D)).astype(np.float32)
    z = (phi.astype(np.float64) @ head.weight.T + head.bias).astype(np.float32)
    if task == "classification":
        return Features(phi, z, (z / temperature + rng.gumbel(size=z.shape)).argmax(1))
    return Features(phi, z, z + 0.5 * rng.normal(size=z.shape))


def fitted(
    task: Task = "classification", width: int = 6, n: int = 600, seed: int = 0, **options: Any
) -> tuple[Fitted, Parts, Features]:
    """A fit on n module, n calibration and n conformal rows, its parts, and n fresh rows."""
    head = linear(width)
    four = [rows(head, task, n, 4 * seed + i) for i in range(4)]
    parts = Parts(*four[:3])
    done = fit_head(head, parts, FitOptions(task=task, seed=seed, **options))
    return done, parts, four[3]


def without_module(head: Head) -> Head:
    """The same head at T = 1 and strength 0: what the frozen model itself says."""
    return head.with_(temperature=1.0, strength=0.0)
