"""Torch normalisations with other scales and shifts, and quick settings of ABNN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

ALPHA = 0.1
QUICK = {"members": 2, "samples": 3, "epochs": 2, "batch": 32}
QUICK |= {"alpha": ALPHA, "prior": 3.0, "learning_rate": 5e-3}


@contextlib.contextmanager
def parameters(part: Any, gamma: np.ndarray, beta: np.ndarray) -> Iterator[None]:
    """A normalisation with another scale and shift."""
    own = {k: getattr(part, k) for k in ("weight", "bias") if getattr(part, k, None) is not None}
    gamma, beta = (torch.as_tensor(np.asarray(v, np.float32)) for v in (gamma, beta))
    hook = None
    if "bias" not in own:  # RMSNorm has none
        hook = part.register_forward_hook(lambda _m, _i, h: h + beta)
    try:
        for key, value in zip(own, (gamma, beta), strict=False):
            setattr(part, key, torch.nn.Parameter(value))
        yield
    finally:
        for key, value in own.items():
            setattr(part, key, value)
        if hook is not None:
            hook.remove()
