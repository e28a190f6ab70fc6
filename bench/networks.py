"""Small frozen networks for tables: trained once, seeded, exported, never touched again.

No third party publishes frozen networks together with tabular data, so these stand in for them.
Standardisation, hidden layers and a linear head are one graph, so that raw columns go in and
logits, or means in the target's own units, come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from posthoc.export import export_torch

EXAMPLES = 64  # rows that the exported graph is compared on


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained: widths of the hidden layers (none: the head alone), passes over
    the rows, rows of a step, first learning rate of Adam."""

    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 30
    batch: int = 256
    rate: float = 3e-3
    seed: int = 0


def train(
    x: NDArray[np.float32], y: NDArray[np.int64] | NDArray[np.float32], recipe: Recipe
) -> nn.Module:
    """A frozen network for rows N×D: of class indices N (int64; cross-entropy, one logit for each
    class up to the largest), or of targets N×K (float32; squared error, outputs in their units).

    Trained to the end, without weight decay, early stopping or smoothing: a classifier comes out
    as over-confident as such networks are. One thread, so that the same rows give the same
    weights on one machine; torch's generator and thread count are left as they were.
    """
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    classifies = not targets.is_floating_point()
    outputs = int(targets.max()) + 1 if classifies else targets.shape[1]
    widths = (x.shape[1], *recipe.hidden)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = nn.Linear(widths[-1], outputs)
        layers: list[nn.Module] = [_Standardise(inputs.mean(0), _scale(inputs))]
        for fan_in, fan_out in zip(widths, recipe.hidden, strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        net = nn.Sequential(*layers, head)
        if classifies:
            _descend(net, inputs, targets, nn.functional.cross_entropy, recipe)
        else:
            centre, spread = targets.mean(0), _scale(targets)
            _descend(net, inputs, (targets - centre) / spread, nn.functional.mse_loss, recipe)
            with torch.no_grad():  # into the head, so that the graph ends in a linear layer
                head.weight.mul_(spread[:, None])
                head.bias.mul_(spread).add_(centre)
    return net.eval().requires_grad_(False)


def export(net: nn.Module, x: NDArray[np.float32], name: str) -> bytes:
    """The network as ONNX, its input called ``name``, compared with it on the first rows of x."""
    return export_torch(net, (torch.from_numpy(x[:EXAMPLES]),), input_names=[name]).model


def matrix(table: pa.Table, names: Sequence[str]) -> NDArray[np.float32]:
    """N×D float32 from D scalar columns in that order, or from one column of lists of length D."""
    first = table[names[0]].combine_chunks()
    if pa.types.is_fixed_size_list(first.type):
        flat = first.flatten().to_numpy()
        return np.array(flat, np.float32).reshape(len(first), -1)
    return np.stack([table[n].to_numpy().astype(np.float32) for n in names], axis=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: the order of sums, and so every trained weight, depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Standardise(nn.Module):
    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.get_buffer("scale")


def _scale(values: Tensor) -> Tensor:
    """Standard deviation of each column; 1 where it is constant."""
    spread = values.std(0)
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _descend(
    net: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    recipe: Recipe,
) -> None:
    """Adam with a learning rate that falls to zero along a cosine; whole batches only."""
    batch = min(recipe.batch, len(inputs))
    whole = len(inputs) // batch * batch
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * whole // batch)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(inputs))
        for start in range(0, whole, batch):
            rows = order[start : start + batch]
            optimiser.zero_grad()
            torch.autograd.backward(loss(net(inputs[rows]), targets[rows]))
            optimiser.step()
            schedule.step()
