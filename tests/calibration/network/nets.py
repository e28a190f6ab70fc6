"""Small torch networks, and their fit with a network-level module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calibration import fit as fitting
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor

MODULE = "nets_of_network_tests"
NETS = """
from torch import nn

def table():
    return nn.Sequential(
        nn.Linear(5, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.125),
        nn.Linear(16, 12), nn.BatchNorm1d(12, eps=1e-2), nn.Tanh(), nn.Dropout(0.25),
        nn.Linear(12, 3),
    )

def values():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))

def maps():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )
"""
MEMBERS = "hedged/members"


def network_of(kind: str) -> Any:
    """The same weights at every call."""
    made: dict[str, Any] = {}
    exec(NETS, made)
    torch.manual_seed(0)
    net = made[kind]().eval()
    with torch.no_grad():
        for part in net:
            if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                part.running_var.uniform_(0.2, 1)
                part.running_mean.uniform_(-0.3, 0.3)
        net[-1].weight.mul_(4)
    return net


def fit(
    folder: Path, kind: str, method: str, out: str, cache: str = "cache", **options: Any
) -> Predictor:
    given = {"task": "regression" if kind == "values" else "classification", "ood": "none"}
    how = {"pixels": 12} if kind == "maps" else {}
    fitting.fit(
        f"{MODULE}:{kind}",
        folder / f"{kind}.npz",
        folder / out,
        FitOptions(method=method, **given | options),
        columns=Columns(target="y"),
        cache_dir=folder / cache,
        checkpoint=folder / f"{kind}.safetensors",
        **how,
    )
    predictor = Predictor(folder / out)
    predictor.self_check()
    return predictor
