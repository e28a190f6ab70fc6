"""The peer's side of the table of small samples: TorchCP 1.2 in its own environment.

Only `bench.peers` starts this module, with the interpreter of that environment.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from bench.conformal_peer import K_REG, PENALTY, declare_operators, serve_side

OPERATORS = declare_operators()
# Importing the library imports a sort that has to be compiled, for one loss that is not used here.
_sort = types.ModuleType("torchsort")
_sort.soft_rank = _sort.soft_sort = None  # type: ignore[attr-defined]
sys.modules["torchsort"] = _sort

warnings.filterwarnings("ignore")

from torchcp.classification.predictor import SplitPredictor  # noqa: E402
from torchcp.classification.score import APS, LAC, RAPS  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
SCORES = {
    "lac": LAC(),
    "aps": APS(randomized=True),
    "raps": RAPS(randomized=True, penalty=PENALTY, kreg=K_REG),
}


def sets(score: str, z: Any, y: Any, new: Any, alphas: Sequence[float]) -> list[Any]:
    """As `bench.conformal_peer.Sets`."""
    found = []
    for alpha in alphas:
        made = SplitPredictor(SCORES[score], alpha=alpha)
        made.calculate_threshold(torch.from_numpy(z), torch.from_numpy(y), alpha)
        found.append(made.predict_with_logits(torch.from_numpy(new)).bool().numpy())
    return found


if __name__ == "__main__":
    serve_side(sets, "torchcp", "torch")
