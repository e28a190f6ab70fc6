"""The peer's side of the Laplace benchmarks: laplace-torch 0.3 in its own environment.

Only `bench.peers` starts this module, with the interpreter of that environment. The backbone is an
Identity, so what is timed is the library's own work on cached features. Prediction runs under
inference mode, as the library does not switch gradients off by itself.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.timing import per_call
from bench.worker import peak_bytes, serve

warnings.filterwarnings("ignore")  # it compiles with a deprecated part of torch

import laplace  # noqa: E402
from laplace.curvature import BackPackGGN  # noqa: E402

CLASSES = {"kron": laplace.KronLLLaplace, "diag": laplace.DiagLLLaplace}
BACKENDS = {"default": None, "backpack": BackPackGGN}


class Batches:
    """A loader of consecutive slices: what torch's own costs per row is not the peer's fault."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.dataset = x
        self._y = y
        self._size = size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self.dataset), self._size):
            yield self.dataset[i : i + self._size], self._y[i : i + self._size]


class Side:
    """The data of a run and the posterior fitted last."""

    x: Tensor
    y: Tensor
    net: nn.Module
    posterior: Any

    def load(self, path: str, dtype: str) -> None:
        """Features, labels and the head from an ``.npz``."""
        torch.set_num_threads(1)
        kind = getattr(torch, dtype)
        with np.load(path, allow_pickle=False) as data:
            self.x = torch.from_numpy(data["phi"]).to(kind)
            self.y = torch.from_numpy(data["y"])
            weight, bias = torch.from_numpy(data["weight"]), torch.from_numpy(data["bias"])
        last = nn.Linear(weight.shape[1], weight.shape[0])
        self.net = nn.Sequential(nn.Identity(), last).to(kind).eval()
        with torch.no_grad():
            last.weight.copy_(weight)
            last.bias.copy_(bias)

    def fit(
        self,
        structure: str,
        prior_precision: float,
        rows: int | None = None,
        batch: int = 256,
        backend: str = "default",
    ) -> float:
        """Fit on the first rows (None: all); seconds."""
        made = CLASSES[structure](
            self.net,
            "classification",
            prior_precision=prior_precision,
            last_layer_name="1",
            backend=BACKENDS[backend],
        )
        loader = Batches(self.x[:rows], self.y[:rows], batch)
        started = time.perf_counter()
        made.fit(loader)
        self.posterior = made
        return time.perf_counter() - started

    def predict(self, what: str, rows: int) -> float:
        """Seconds a point of one way to predict, on the first rows as one batch."""
        x = self.x[:rows]
        with torch.inference_mode():
            self._run(what, x[:1])
            return per_call(lambda: self._run(what, x)) / rows

    def answer(self, what: str, rows: int, path: str) -> None:
        """What is predicted for the first rows, one at a time, into an ``.npz``."""
        with torch.inference_mode():
            found = [self._run(what, row).numpy() for row in self.x[:rows, None]]
        np.savez(path, value=np.concatenate(found))

    def peak(self, what: str, rows: int) -> int:
        """Bytes by which memory rises during one prediction; the posterior is not counted."""
        x = self.x[:rows]
        with torch.inference_mode():
            self._run(what, x[:1])
            return peak_bytes(lambda: self._run(what, x))

    def versions(self) -> dict[str, str]:
        """Of the peer and of what it computes with."""
        from importlib.metadata import version

        return {name: version(name) for name in ("laplace-torch", "torch")}

    def _run(self, what: str, x: Tensor) -> Tensor:
        if what == "probs":
            found: Tensor = self.posterior(x, pred_type="glm", link_approx="probit")
            return found
        if what == "covariance":
            covariance: Tensor = self.posterior._glm_predictive_distribution(x)[1]
            return covariance
        # Documented as the fast way, but nothing public reaches it; the link is that of __call__.
        mean, variance = self.posterior._glm_predictive_distribution(x, diagonal_output=True)
        return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), dim=-1)


if __name__ == "__main__":
    side = Side()
    serve({n: getattr(side, n) for n in ("load", "fit", "predict", "answer", "peak", "versions")})
