"""Small torch networks, opened as frozen models, and what their samples are, one at a time."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import posthoc.network.attach as attaching
from posthoc import registry
from posthoc.export import export_torch
from posthoc.frozen import Frozen, open_frozen
from posthoc.model.probe import with_outputs
from posthoc.network.attach import MEMBERS, Attached, NetworkRows
from posthoc.network.fold import Noise
from posthoc.runtime import open_session


class Images(nn.Module):
    """12×12 images, four classes; ε and momentum are not the usual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6, eps=3e-2, momentum=0.3)
        self.whole = nn.Dropout2d(0.25)
        self.second = nn.Conv2d(6, 8, 3)
        self.inner = nn.BatchNorm2d(8, eps=1e-3)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.batch(self.first(x)))
        h = nn.functional.max_pool2d(self.whole(h), 2)
        h = torch.relu(self.inner(self.second(h))).mean((2, 3))
        return self.head(self.drop(h))


class Table(nn.Module):
    """Vectors of five through a LayerNorm, and K outputs; one: the probability of the second of
    two classes."""

    def __init__(self, outputs: int = 3, *, sigmoid: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.layer = nn.LayerNorm(12, eps=1e-3)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(12, 8)
        self.lines = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, outputs)
        self.sigmoid = sigmoid

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.layer(self.first(x))))
        h = self.head(torch.tanh(self.lines(self.second(h))))
        return torch.sigmoid(h) if self.sigmoid else h


class Pair(nn.Module):
    """Two inputs, of which one passes by the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(5, 6), nn.Linear(2, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.first(x))) + torch.tanh(self.other(extra)))


class Norms(nn.Module):
    """A normalisation of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6, eps=3e-2)
        self.second = nn.Conv2d(6, 6, 3)
        self.group = nn.GroupNorm(3, 6)
        self.third = nn.Conv2d(6, 6, 3)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.between = nn.Linear(6, 8)
        self.layer = nn.LayerNorm(8, eps=1e-3)
        self.rms = nn.RMSNorm(8, eps=1e-5)
        self.lines = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.batch(self.first(x)))
        h = torch.relu(self.group(self.second(h)))
        h = torch.relu(self.instance(self.third(h))).mean((2, 3))
        h = torch.tanh(self.layer(self.between(h)))
        return self.head(torch.tanh(self.lines(h + self.rms(h))))


class Maps(nn.Module):
    """Classes, or values, of the pixels of 12×12 images."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6)
        self.whole = nn.Dropout2d(0.25)
        self.head = nn.Conv2d(6, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.whole(torch.relu(self.batch(self.first(x)))))


class Plain(nn.Module):
    """Neither dropout nor a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


KINDS = {
    "images": Images,
    "table": Table,
    "single": lambda: Table(1, sigmoid=True),
    "values": lambda: Table(2),
    "pair": Pair,
    "norms": Norms,
    "maps": Maps,
    "plain": Plain,
}
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
NORMALISATIONS += (nn.InstanceNorm2d, nn.RMSNorm)
DROPOUTS = (nn.Dropout, nn.Dropout2d)


@cache
def network(kind: str) -> Any:
    """A network in evaluation mode, its parameters and statistics all its own."""
    torch.manual_seed(0)
    net = KINDS[kind]().eval()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, NORMALISATIONS):
                part.weight.uniform_(0.5, 1.5)
                if getattr(part, "bias", None) is not None:
                    part.bias.uniform_(-0.5, 0.5)
                if getattr(part, "running_var", None) is not None:
                    part.running_var.uniform_(0.5, 2)
                    part.running_mean.uniform_(-0.5, 0.5)
        net.head.weight.mul_(4.0)
    return net


def inputs(kind: str, n: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = kind in ("images", "norms", "maps")
    x = rng.normal(size=(n, 1, 12, 12) if image else (n, 5)).astype(np.float32)
    extra = {"extra": rng.normal(size=(n, 2)).astype(np.float32)} if kind == "pair" else {}
    return {"x": x, **extra}


def run(net: Any, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """The outputs before any sigmoid."""
    with torch.no_grad():
        z = net(**{k: torch.as_tensor(v) for k, v in given.items()}).numpy()
    return np.log(z / (1 - z)) if getattr(net, "sigmoid", False) else z


def rows(kind: str, n: int, seed: int = 1) -> NetworkRows:
    """Rows whose labels are drawn from the network's own predictions."""
    given = inputs(kind, n, seed)
    z = run(network(kind), given)
    rng = np.random.default_rng(seed)
    if kind == "values":
        return NetworkRows(given, (z + rng.normal(size=z.shape)).astype(np.float64))
    z = np.concatenate([np.zeros_like(z), z], 1) if z.shape[1] == 1 else z
    return NetworkRows(given, (z + rng.gumbel(size=z.shape)).argmax(1))


@cache
def frozen(kind: str, keep: Any) -> Frozen:
    """The network, exported and opened."""
    given = inputs(kind, 8)
    tensors = {k: torch.as_tensor(v) for k, v in given.items()}
    made = export_torch(network(kind), tensors, rows=tensors, keep=keep)
    task: Any = "regression" if kind == "values" else "classification"
    return open_frozen(made.model, task=task, sample=given)


def older(kind: str, opset: int, *, training: bool) -> bytes:
    """What torch's older exporter writes of a network; its dropouts are left only in training."""
    mode = torch.onnx.TrainingMode
    net, given, file = network(kind), inputs(kind, 4), io.BytesIO()
    net.train(training)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, tuple(map(torch.as_tensor, given.values())), file, dynamo=False,
            opset_version=opset, input_names=[*given], output_names=["y"],
            dynamic_axes={k: {0: "n"} for k in (*given, "y")},
            training=mode.TRAINING if training else mode.PRESERVE, do_constant_folding=False,
        )  # fmt: skip
    net.eval()
    return file.getvalue()


@dataclass(frozen=True)
class Made:
    """What an attach page gave, and the noise that it put into the graph, by tensor in order."""

    attached: Attached
    noises: dict[str, Noise]

    @property
    def frozen(self) -> Frozen:
        return self.attached.frozen

    def members(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """S×N×C (or S×N×C×H×W) outputs of the copies in the graph."""
        _, found = both(self.frozen, given)
        split = found.reshape(len(found), -1, self.frozen.z_dim, *found.shape[2:])
        return np.moveaxis(split, 1, 0)


def both(model: Frozen, given: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """z and φ of an attached model, in one session and one run."""
    import onnx

    proto = onnx.load_from_string(model.model)
    session = open_session(with_outputs(proto, [model.z, MEMBERS]))
    z, phi = session.run([model.z, MEMBERS], dict(given))
    return z, phi


def attach(
    name: str, model: Frozen, given: NetworkRows, task: Any = "classification", **settings: Any
) -> Made:
    """The page's own attach, and the noise that it handed to the graph."""
    seen: list[Mapping[str, Noise]] = []
    real = attaching.sampled

    def watched(model: bytes, output: str, noises: Any, members: str, **how: Any) -> bytes:
        seen.append(noises)
        return real(model, output, noises, members, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attaching, "sampled", watched)
        made = registry.page(name).attach(model, given, task, registry.settings(name, settings))
    return Made(made, dict(seen[-1]))


@contextlib.contextmanager
def hooked(parts: Sequence[nn.Module], changes: Sequence[Any]) -> Iterator[None]:
    """Each part's output goes through its change."""
    hooks = [
        part.register_forward_hook(lambda _m, _i, h, f=change: f(h))
        for part, change in zip(parts, changes, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts(net: nn.Module, kinds: Any) -> list[nn.Module]:
    """The parts of these kinds, in the order in which they are defined (and run)."""
    return [m for m in net.modules() if isinstance(m, kinds)]
