"""BayesCap on maps: a small convolutional network over a frozen output map.

Maps are K×H×W, targets likewise, a NaN where a pixel has no target. The frozen map stays the mean;
the network gives log alpha and log beta of every pixel and channel, as
`posthoc.methods.bayescap.vector` does for a row. It is trained by the true likelihood on random
windows; images held out say when to stop, which share of the way from the homoscedastic
distribution to the network is gone, the scale of alpha, and where the variance of a heavy tail
ends, a channel each.

A pixel counts in training only where the window shows all that the network would see of it in the
whole image, so that what is trained is what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import F64, Array, FitError, State
from posthoc.methods.bayescap import generalised_gaussian as gg
from posthoc.methods.bayescap import network, windows
from posthoc.methods.bayescap.parameters import (
    HALF,
    MIDDLE,
    MOST,
    bound_variance,
    bounds,
    constants,
    emit_log_beta,
    emit_log_variance_factor,
    finest,
    log_beta,
    middle,
    recalibrate,
)

if TYPE_CHECKING:
    from torch import Tensor

    from posthoc.graph import Fragment

    Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of log |r|, log alpha, log beta: each pixel


class Settings(BaseModel):
    """``channels`` and residual ``blocks`` of the network; ``crop`` the side of the windows in
    which pixels count; ``learning_rate``, ``weight_decay`` and ``batch_size`` (windows) of AdamW,
    at most ``steps`` steps, stopped after ``patience`` looks at held-out images without a better
    one; ``seed`` of the first weights and of the windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    channels: int = Field(default=24, ge=1)
    blocks: int = Field(default=2, ge=0)
    crop: int = Field(default=48, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    batch_size: int = Field(default=8, ge=1)
    steps: int = Field(default=2000, ge=1)
    patience: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)


EVERY = 5  # one image in so many is held out
LOOK = 50  # steps between two looks at the held-out windows
HELD_SIDE, HELD_WINDOWS = 96, 64  # that a look sees
SMALLEST = 1e-6  # a decrease that counts


@dataclass(frozen=True, slots=True)
class Trained:
    """A network before recalibration: ``tensors`` with the standardisation of its input, the
    constants ``fixed`` 2K from which it counts, what it says (``raw`` n×2K) and the log errors n×K
    of held-out pixels, and the ``steps`` that it took."""

    tensors: dict[str, Array]
    fixed: F64
    raw: F64
    log_r: F64
    steps: int


def train_image_cap(
    z_maps: Sequence[Array], y_maps: Sequence[Array], settings: Settings | None = None
) -> State:
    """The cap of frozen maps K×H×W and targets of the same shapes, one of each an image.

    On held-out images it is never worse than the homoscedastic distribution, which takes its place
    where nothing better is found (settings ``gate`` 0). Raises FitError for fewer than two images,
    shapes that differ, outputs that are not finite, and a channel that is predicted without error.
    """
    settings = settings or Settings()
    trained = train_network(z_maps, y_maps, settings, likelihood)
    raw = np.clip(trained.raw, *bounds(trained.raw))
    chosen = recalibrate(raw, trained.log_r, trained.fixed)
    said = {
        **settings.model_dump(),
        "images": len(z_maps),
        "held_out_pixels": len(trained.log_r),
        "steps_taken": trained.steps,
        "gate": chosen.gate.tolist(),
        "scale": np.exp(chosen.log_scale).tolist(),
        "held_out_nll": chosen.nll.tolist(),
        "held_out_nll_homoscedastic": chosen.nll_constant.tolist(),
    }
    state = finish(trained, chosen.gate, chosen.log_scale, said)
    k = len(chosen.gate)
    x = np.clip(
        trained.raw * np.tile(chosen.gate, 2) + _offset(trained, chosen.log_scale),
        state.tensors["low"],
        state.tensors["high"],
    )
    log_v = 2 * x[:, :k] + gg.log_variance_factor(np.exp(log_beta(x[:, k:])))
    most, factor = bound_variance(log_v, np.exp(2 * trained.log_r))
    tensors = {**state.tensors, "log_variance_most": most, "log_variance_factor": factor}
    return State(tensors, state.settings)


def _offset(trained: Trained, log_scale: Array) -> F64:
    return np.asarray(trained.fixed + np.append(log_scale, np.zeros(len(log_scale))))


def finish(trained: Trained, gate: Array, log_scale: Array, said: Mapping[str, Any]) -> State:
    """The state that serves: shares K and scales K are written into the last
    convolution, and what it says is kept inside its range on held-out pixels."""
    share, offset = np.tile(gate, 2), _offset(trained, log_scale)
    low, high = bounds(trained.raw)
    weight, bias = trained.tensors["last.weight"], trained.tensors["last.bias"]
    last = {
        "last.weight": (weight * share[:, None, None, None]).astype(np.float32),
        "last.bias": (bias * share + offset).astype(np.float32),
        "low": low * share + offset,
        "high": high * share + offset,
    }
    return State({**trained.tensors, **last}, dict(said))


def apply_image_cap(state: State, z_maps: Array) -> tuple[F64, F64]:
    """(alpha, beta), N×K×H×W each, of frozen maps N×K×H×W (float64 definition, in torch)."""
    import torch

    t = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in state.tensors.items()}
    with torch.no_grad():
        z = torch.from_numpy(np.asarray(z_maps, np.float64))
        raw = network.forward(t, state.settings["blocks"], z)
    low, high = (state.tensors[k][:, None, None] for k in ("low", "high"))
    value = np.clip(raw.numpy(), low, high)
    k = value.shape[1] // 2
    return np.exp(value[:, :k]), np.exp(log_beta(value[:, k:]))


def cap_graph(g: Fragment, state: State, z: str) -> str:
    """log alpha and log beta N×2K×H×W of the map ``z`` N×K×H×W as a graph fragment."""
    k = len(state.tensors["mean"])
    low, high = (g.const(state.tensors[name][:, None, None]) for name in ("low", "high"))
    value = network.emit(g, state.tensors, state.settings["blocks"], z)
    value = g.op("Max", g.op("Min", value, high), low)
    log_alpha, b = g.op2("Split", value, g.const([k, k], "int64"), axis=1)
    return g.op("Concat", log_alpha, emit_log_beta(g, b), axis=1)


def variance(state: State, alpha: Array, beta: Array) -> F64:
    """Variances N×K×H×W from what `apply_image_cap` gave: those of the distribution, ended and
    scaled as `bound_variance` found. They are what errors are measured to be; the density keeps
    its tail."""
    most, factor = (
        state.tensors[name][:, None, None] for name in ("log_variance_most", "log_variance_factor")
    )
    log_v = 2 * np.log(alpha) + gg.log_variance_factor(beta)
    return np.asarray(np.exp(np.minimum(log_v, most) + factor))


def emit_log_variance(g: Fragment, state: State, logs: str) -> str:
    """The logarithm of `variance` N×K×H×W from what `cap_graph` gave."""
    k = len(state.tensors["mean"])
    most, factor = (
        g.const(state.tensors[name][:, None, None])
        for name in ("log_variance_most", "log_variance_factor")
    )
    log_alpha, u = g.op2("Split", logs, g.const([k, k], "int64"), axis=1)
    twice = g.op("Add", log_alpha, log_alpha)
    total = g.op("Add", twice, emit_log_variance_factor(g, u))
    return g.op("Add", g.op("Min", total, most), factor)


def likelihood(log_r: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """Negative log density in nats, `generalised_gaussian.log_nll` in torch, tangents as in every
    training of this method."""
    import torch

    beta = log_beta.exp()
    e = beta * (log_r - log_alpha)
    power = e.clamp(gg.LOWEST, MOST).exp() * (1.0 + (e - MOST).clamp(min=0.0))
    return float(np.log(2.0)) + log_alpha + torch.lgamma(1.0 / beta) - log_beta + power


def train_network(
    z_maps: Sequence[Array], y_maps: Sequence[Array], settings: Settings, loss: Loss
) -> Trained:
    """Train on four images of five by the mean ``loss`` of their pixels, and stop by the fifth."""
    import torch

    windows.check(z_maps, y_maps)
    margin, rng = network.radius(settings.blocks), np.random.default_rng(settings.seed)
    sides = windows.smallest(z_maps, margin)
    held = list(range(len(z_maps)))[EVERY - 1 :: EVERY] or [len(z_maps) - 1]
    kept = sorted(set(range(len(z_maps))) - set(held))
    z_kept, y_kept = [z_maps[i] for i in kept], [y_maps[i] for i in kept]
    errors = windows.errors(z_kept, y_kept)
    fixed, start, least = constants(errors), middle(errors), finest(errors)
    k = len(fixed) // 2
    layers = network.start(k, settings.channels, settings.blocks, rng)
    t = {n: torch.tensor(v, dtype=torch.float32) for n, v in windows.scales(z_kept).items()}
    learnt = {n: torch.tensor(v, dtype=torch.float32) for n, v in layers.items()}
    t |= {n: v.requires_grad_() for n, v in learnt.items()}
    descent = torch.optim.AdamW(
        learnt.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    offset = torch.tensor(start, dtype=torch.float32)[:, None, None]

    def cut(cutter: windows.Cutter, images: Sequence[int]) -> tuple[Tensor, ...]:
        parts = zip(*(cutter(z_maps[i], y_maps[i], rng) for i in images), strict=True)
        return tuple(torch.from_numpy(np.stack(part)) for part in parts)

    def total(z: Tensor, log_r: Tensor, counts: Tensor) -> Tensor:
        x = network.forward(t, settings.blocks, z) + offset
        each = loss(log_r, x[:, :k], MIDDLE + HALF * torch.tanh(x[:, k:] / 2))
        return (each * counts).sum()

    wide = windows.Cutter(HELD_SIDE, margin, sides, least)
    looked = [cut(wide, [i]) for i in held[:HELD_WINDOWS]]
    seen = max(float(sum(counts.sum() for _, _, counts in looked)), 1.0)

    def look() -> float:
        with torch.no_grad():
            return sum(float(total(*w)) for w in looked) / seen

    def copied() -> dict[str, Tensor]:
        return {n: v.detach().clone() for n, v in t.items()}

    best, at, value, misses = copied(), 0, look(), 0
    cutter = windows.Cutter(settings.crop, margin, sides, least)
    for step in range(1, settings.steps + 1):
        batch = cut(cutter, rng.choice(kept, settings.batch_size).tolist())
        descent.zero_grad()
        (total(*batch) / batch[2].sum().clamp(min=1.0)).backward()  # type: ignore[no-untyped-call]
        descent.step()
        if step % LOOK and step < settings.steps:
            continue
        new = look()
        misses += 1
        if new < value - SMALLEST:
            best, at, value, misses = copied(), step, new, 0
        if misses == settings.patience:
            break
    best["last.bias"] += torch.tensor(start - fixed, dtype=torch.float32)
    raw, log_r = _pixels(best, settings.blocks, looked)
    return Trained({n: v.numpy() for n, v in best.items()}, fixed, raw, log_r, at)


def _pixels(
    t: Mapping[str, Tensor], blocks: int, looked: Sequence[tuple[Tensor, ...]]
) -> tuple[F64, F64]:
    """What the network says n×2K of the pixels that count, and their log errors n×K; at most
    `windows.PIXELS`. FitError where there are none."""
    import torch

    raw, log_r = [], []
    with torch.no_grad():
        for z, size, counts in looked:
            use = counts[0].bool().all(0)
            raw.append(network.forward(t, blocks, z)[0][:, use].T.double().numpy())
            log_r.append(size[0][:, use].T.double().numpy())
    n = sum(map(len, raw))
    if n == 0:
        raise FitError("bayescap: no pixel of a held-out image has a target; give more images")
    step = -(-n // windows.PIXELS)
    return np.concatenate(raw)[::step], np.concatenate(log_r)[::step]
