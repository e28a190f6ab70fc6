"""The peer's side of the figures of OOD scores: pytorch-ood 0.4 in its own environment.

Only `bench.peers` starts this module, with the interpreter of that environment. Its detectors are
used as they are written, on features and outputs; where a definition differs in what it estimates
(a shrunk covariance, the factor of ViM), the detector is given ours after its own fit.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.conformal_peer import declare_operators
from bench.worker import serve

OPERATORS = declare_operators()  # it imports torchvision
warnings.filterwarnings("ignore")

from pytorch_ood.detector import (  # noqa: E402
    KNN,
    NCI,
    RMD,
    EnergyBased,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    ReAct,
    ViM,
    fDBD,
)

torch.set_grad_enabled(False)


class Side:
    """The detector that is timed, and its queries."""

    knn: Any
    queries: Tensor
    found: Tensor

    def fit(self, path: str, k: int, threads: int) -> float:
        """Seconds of a fit of `KNN` on the ``bank`` of an ``.npz``; its ``queries`` are kept."""
        torch.set_num_threads(threads)
        with np.load(path, allow_pickle=False) as data:
            bank, self.queries = (torch.from_numpy(data[name]) for name in ("bank", "queries"))
        started = time.perf_counter()
        self.knn = KNN(None, k=k).fit_features(bank, torch.zeros(len(bank), dtype=torch.int64))
        return time.perf_counter() - started

    def predict(self) -> float:
        """Seconds of the scores of all queries."""
        started = time.perf_counter()
        self.found = self.knn.predict_features(self.queries)
        return time.perf_counter() - started

    def answer(self, path: str) -> None:
        """The scores of the last call, into an ``.npz``."""
        np.savez(path, scores=self.found.numpy())

    def scores(self, given: str, path: str) -> None:
        """Every score of an ``.npz`` of features, outputs, labels, head and our ingredients, into
        another: under its own name as it is, under ``ours/NAME`` with those ingredients."""
        # Some detectors allocate in the default type and some round to float32, in which the
        # eigenvectors of ViM are another basis: definitions are compared here, and not rounding.
        torch.set_default_dtype(torch.float64)
        single, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # type: ignore[method-assign]
        try:
            with np.load(given, allow_pickle=False) as data:
                found = _scores({k: torch.from_numpy(data[k]) for k in data.files})
        finally:
            torch.set_default_dtype(torch.float32)
            torch.Tensor.float = single  # type: ignore[method-assign]
        np.savez(path, **{k: v.numpy() for k, v in found.items()})  # type: ignore[arg-type]

    def versions(self) -> dict[str, str]:
        """Of the peer and of what it computes with."""
        from importlib.metadata import version

        return {name: version(name) for name in ("pytorch-ood", "scikit-learn", "torch")}


def _scores(t: dict[str, Tensor]) -> dict[str, Tensor]:
    phi, y, new, new_z = t["phi"], t["y"], t["new_phi"], t["new_z"]
    outputs, width = t["weight"].shape
    linear = torch.nn.Linear(width, outputs)
    linear.weight.copy_(t["weight"])
    linear.bias.copy_(t["bias"])
    vim = ViM(None, int(t["vim_d"]), t["weight"], t["bias"])
    near, relative = Mahalanobis(None), RMD(None)
    react = ReAct(None, linear, percentile=0.9)
    found = {
        "msp": MaxSoftmax.score(new_z),
        "max_logit": MaxLogit.score(new_z),
        "energy": EnergyBased.score(new_z),
        "knn": KNN(None, k=int(t["knn_k"])).fit_features(phi, y).predict_features(new),
        "vim": vim.fit_features(phi, y).predict_features(new),
        "mds": near.fit_features(phi, y).predict_features(new),
        "rmds": relative.fit_features(phi, y).predict_features(new),
        "react": react.fit_feature_maps(phi, y).predict_feature_maps(new),
        "fdbd": fDBD(None, linear).fit_features(phi).predict_features(new),
        "nci": NCI(None, linear, alpha=1e-4).fit_features(phi).predict_features(new),
    }
    vim.alpha = float(t["vim_alpha"])
    near.precision = relative.precision = t["within"]
    relative.background_precision = t["common"]
    return found | {
        "ours/vim": vim.predict_features(new),
        "ours/mds": near.predict_features(new),
        "ours/rmds": relative.predict_features(new),
    }


if __name__ == "__main__":
    side = Side()
    names = ("fit", "predict", "answer", "scores", "versions")
    serve({n: getattr(side, n) for n in names})
