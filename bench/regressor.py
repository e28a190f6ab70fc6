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
from numpy.typing import NDArray
from torch import nn

from bench import networks
from bench.assets import cached, diamonds

VERSION = "1"  # raise it when the rows or the training change: it names the cache folder
INPUTS = ("carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z")
TARGET = "log_price"
SEED = 0
TRAIN_ROWS = 24_000
RECIPE = networks.Recipe(seed=SEED)


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
    model = networks.export(network(x, y), x, "features")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    pq.write_table(train, folder / "train.parquet", compression="zstd")
    pq.write_table(data, folder / "data.parquet", compression="zstd")


def matrix(table: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs N×9 in the order of ``INPUTS`` and targets N×1."""
    return networks.matrix(table, INPUTS), networks.matrix(table, (TARGET,))


def network(x: NDArray[np.float32], y: NDArray[np.float32]) -> nn.Module:
    """Standardisation, two hidden layers of 64 and a linear head, trained on squared error.

    The scale of the target is folded into the head, so that the graph ends in a linear layer.
    """
    return networks.train(x, y, RECIPE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.regressor OUT")
    write(Path(sys.argv[1]))
