"""What every side of the table of small samples does with the same splits of the same logits.

It runs in the environments of other libraries, and so imports nothing of ours but `bench.worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.worker import serve

# sets(score, z n×C, y n, z m×C, alphas) -> a boolean m×C for each level
Sets = Callable[[str, Any, Any, Any, Sequence[float]], list[Any]]
PENALTY, K_REG = 0.1, 1  # of RAPS, the same for all


class Side:
    """Logits, labels, and which rows of them each split takes; a library's sets over them."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets

    def load(self, path: str) -> None:
        """``z`` N×C, ``y`` N and ``rows`` S×(most + m) from an ``.npz``."""
        with np.load(path, allow_pickle=False) as data:
            self.z, self.y, self.rows = data["z"], data["y"], data["rows"]

    def run(self, path: str, score: str, n: int, test: int, alphas: list[float]) -> None:
        """Coverage and mean size of every split and level, S×A×2, into an ``.npz``: the first n
        of a split's rows are conformal and its last ``test`` are predicted."""
        found = np.zeros((len(self.rows), len(alphas), 2))
        for i, rows in enumerate(self.rows):
            known, new = rows[:n], rows[-test:]
            made = self._sets(score, self.z[known], self.y[known], self.z[new], alphas)
            for j, sets in enumerate(made):
                covered = sets[np.arange(test), self.y[new]]
                found[i, j] = covered.mean(), sets.sum(1).mean()
        np.savez(path, value=found)


def serve_side(sets: Sets, *packages: str) -> None:
    """Serve ``load``, ``run`` and the versions of ``packages``."""
    from importlib.metadata import version

    side = Side(sets)
    serve(
        {
            "load": side.load,
            "run": side.run,
            "versions": lambda: {name: version(name) for name in packages},
        }
    )


def declare_operators() -> Any:
    """Make torchvision load beside a CPU torch (see `bench.abnn_peer`); keep what is returned."""
    import torch

    if torch.cuda.is_available():
        return None
    made = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        made.define(  # type: ignore[no-untyped-call]
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return made
