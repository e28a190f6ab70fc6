"""The peer's side of the table of small samples: torch-uncertainty 0.13 in its own environment.

Only `bench.peers` starts this module, with the interpreter of that environment. The model is an
identity on logits; the temperature that its classes would fit on the conformal rows is off, so that
the scores are everybody's. Its sets are never empty, which no setting changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bench.conformal_peer import K_REG, PENALTY, declare_operators, serve_side

OPERATORS = declare_operators()
warnings.filterwarnings("ignore")

from torch_uncertainty.post_processing import (  # noqa: E402
    ConformalClsAPS,
    ConformalClsRAPS,
    ConformalClsTHR,
)

torch.set_num_threads(1)
torch.manual_seed(0)


def made(score: str, alpha: float) -> Any:
    """A predictor of the library for a score."""
    given: dict[str, Any] = {"alpha": alpha, "model": nn.Identity(), "enable_ts": False}
    if score == "lac":
        return ConformalClsTHR(**given)
    if score == "aps":
        return ConformalClsAPS(randomized=True, **given)
    return ConformalClsRAPS(randomized=True, penalty=PENALTY, regularization_rank=K_REG, **given)


def sets(score: str, z: Any, y: Any, new: Any, alphas: Sequence[float]) -> list[Any]:
    """As `bench.conformal_peer.Sets`."""
    found = []
    for alpha in alphas:
        one = made(score, alpha)
        one.fit([(torch.from_numpy(z), torch.from_numpy(y))])
        found.append((one(torch.from_numpy(new)) > 0).numpy())
    return found


if __name__ == "__main__":
    serve_side(sets, "torch-uncertainty", "torch")
