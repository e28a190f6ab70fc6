"""A frozen regressor to work on: a small network that predicts the log price of diamonds.

No third party publishes a frozen regressor together with data, so this one is trained here, once,
with a fixed seed: ``python -m bench.regressor OUT`` writes ``model.onnx``, ``train.parquet`` (the
rows the network learnt from) and ``data.parquet`` (the rows it never saw).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.assets import cached, diamonds
from posthoc.export import export_torch

VERSION = "1"  # raise it when the rows or the training change: it names the cache folder
INPUTS = ("carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z")
TARGET = "log_price"
SEED = 0
TRAIN_ROWS = 24_000
EPOCHS = 30
BATCH = 256
WIDTH = 64


@dataclass(frozen=True, slots=True)
class Regressor:
    """The frozen model (float32 ``features`` [N, 9] -> log price [N, 1]) and its rows."""

    model: Path
    train: Path
    data: Path


def regressor() -> Regressor:
    """The trained regressor from the asset cache, trained there on first use (seconds)."""
    folder = cached(f"diamonds-mlp-{VERSION}", write)
    return Regressor(folder / "model.onnx", folder / "train.parquet", folder / "data.parquet")


def write(folder: Path) -> None:
    """Train and write the three files into ``folder``; on one machine the same bytes every time."""
    table = diamonds()
    order = np.random.default_rng(SEED).permutation(table.num_rows)
    train, data = table.take(order[:TRAIN_ROWS]), table.take(order[TRAIN_ROWS:])
    x, y = matrix(train)
    exported = export_torch(network(x, y), (torch.from_numpy(x[:64]),), input_names=["features"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(exported.model)
    pq.write_table(train, folder / "train.parquet", compression="zstd")
    pq.write_table(data, folder / "data.parquet", compression="zstd")


def matrix(table: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs N×9 in the order of ``INPUTS`` and targets N×1."""
    x = np.stack([table[name].to_numpy() for name in INPUTS], axis=1)
    return x, table[TARGET].to_numpy().reshape(-1, 1).copy()  # Arrow's own memory is read-only


class _Standardise(nn.Module):
    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.get_buffer("scale")


def network(x: NDArray[np.float32], y: NDArray[np.float32]) -> nn.Module:
    """Standardisation, two hidden layers of 64 and a linear head, trained on squared error.

    The scale of the target is folded into the head, so that the graph ends in a linear layer.
    """
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    centre, spread = targets.mean(), targets.std()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            head = nn.Linear(WIDTH, 1)
            net = nn.Sequential(
                _Standardise(inputs.mean(0), inputs.std(0)),
                nn.Linear(x.shape[1], WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.SiLU(),
                head,
            )
            _train(net, inputs, (targets - centre) / spread)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        head.weight.mul_(spread)
        head.bias.mul_(spread).add_(centre)
    return net.eval().requires_grad_(False)


def _train(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Adam with a learning rate that falls to zero along a cosine."""
    steps = EPOCHS * (len(inputs) // BATCH)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs) // BATCH * BATCH, BATCH):
            batch = order[start : start + BATCH]
            loss = nn.functional.mse_loss(net(inputs[batch]), targets[batch])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.regressor OUT")
    write(Path(sys.argv[1]))
