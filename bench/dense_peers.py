"""Two ways to a map of uncertainty that need no fit, as users of a restoration network have them.

Test-time augmentation (Wang et al. 2019, arXiv:1807.07356, with the eight symmetries of the square)
and MC-dropout (Gal & Ghahramani 2016, arXiv:1506.02142): the standard deviation over some passes of
the frozen network. Neither knows the scale of an error, so that only the order of pixels and the
correlation with |error| are comparable.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from calibration.metrics.correlation import image_correlations, pearson
from calibration.metrics.sparsification import image_ause
from posthoc.contract import F64, Array

RATE = 0.1
BATCH = 32


def figures(error: Array, sigma: Array) -> dict[str, float]:
    """Of N maps each: ``pearson`` and ``ause`` with its random order, means over images, and
    ``pearson_pooled`` over all pixels. A figure that no image has is NaN."""
    size = np.abs(error)
    columns = {"pearson": image_correlations(size, sigma)["pearson"], **image_ause(size, sigma)}
    means = {k: float(c[~np.isnan(c)].mean()) for k, c in columns.items() if not np.isnan(c).all()}
    return dict.fromkeys(columns, float("nan")) | means | {"pearson_pooled": pearson(size, sigma)}


def augmented(predict: Callable[[Array], Array], x: Array) -> F64:
    """Standard deviation N×K×H'×W' over the eight symmetries of square images N×C×H×H, each
    prediction turned back."""
    made = []
    for turns in range(4):
        for mirrored in (False, True):
            view = np.rot90(x, turns, (2, 3))
            view = view[..., ::-1] if mirrored else view
            z = predict(np.ascontiguousarray(view))
            z = z[..., ::-1] if mirrored else z
            made.append(np.rot90(z, -turns, (2, 3)))
    return np.asarray(np.std(made, axis=0, dtype=np.float64))


def dropped(
    net: nn.Module, layer: nn.Module, x: Array, *, samples: int, rate: float = RATE, seed: int = 0
) -> F64:
    """Standard deviation over passes of a frozen network with dropout at the input of ``layer``."""

    def thin(module: nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        del module
        return nn.functional.dropout(given[0], rate)

    found = []
    hook = layer.register_forward_pre_hook(thin)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for start in range(0, len(x), BATCH):
                part = torch.from_numpy(x[start : start + BATCH])
                passes = torch.stack([net(part) for _ in range(samples)])
                found.append(passes.double().std(0, correction=0).numpy())
    finally:
        hook.remove()
    return np.concatenate(found)
