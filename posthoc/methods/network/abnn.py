"""ABNN: noise on normalisation layers, and members trained into different modes.

Franchi et al. 2024, "Make Me a BNN" (arXiv:2312.15297). Behind every normalisation, which gives
h = γu + β, the scale is multiplied by 1 + αε with ε ~ N(0, 1): one number a channel and sample, or
one an element. M members start from the frozen network and are trained for a few epochs with the
classes weighted at random (eq. 5), so that they part; each is served with its own draws of ε.

Only the normalisations' parameters move: member m has γ(1 + d) and β + δ, so that d = δ = 0 and
α = 0 are the frozen network, bit for bit, whatever the kind of normalisation. What is stored are d
and δ; the draws of ε are in the graph. Weight decay pulls d and δ to 0. A member stops at its best
epoch by its own weighted loss on module rows held out, and one that loses accuracy there is
rejected: see ``guard``.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import Array, FitError, Info, LinearHead, ModelError, Paper, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.methods.network import members
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.export import Keep
    from posthoc.frozen import Frozen
    from posthoc.graph import Fragment
    from posthoc.network.attach import Attached, NetworkRows
    from posthoc.network.sites import Site

INFO = Info(
    name="abnn",
    kind="module",
    tasks=("classification",),
    needs=frozenset({"features", "network", "labels"}),
    summary="noise on the scales of normalisation layers, in members trained apart",
    paper=Paper(
        "Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from Pre-trained "
        "Models",
        2024,
        "https://arxiv.org/abs/2312.15297",
    ),
    passes=30,
    preserves=False,
    either=True,
)
ROWS = 20_000  # module rows that are read, at most
LOSS = 0.005  # of accuracy that a member may have, at 95 % confidence
ENOUGH = 3200  # rows on which the guard can tell
HELD_OUT = 5  # one module row in so many judges
NORMAL95 = 1.6448536269514722


class Settings(BaseModel):
    """``members`` M with ``samples`` draws each; ``alpha`` the noise on a scale, per ``noise``
    channel or element; ``prior`` the weight of the floor(sqrt(C)) classes that a member favours;
    at most ``epochs`` over the module rows (0: no training) in batches of ``batch``, with
    ``learning_rate`` and ``weight_decay`` of SGD with Nesterov momentum 0.9; ``seed``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    members: int = Field(default=3, ge=1)
    samples: int = Field(default=10, ge=1)
    alpha: float = Field(default=0.03, ge=0)
    noise: Literal["channel", "element"] = "channel"
    prior: float = Field(default=2.0, gt=0)
    epochs: int = Field(default=5, ge=0)
    batch: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    seed: int = Field(default=0, ge=0)


def keep(settings: Settings) -> Keep:
    """What the export of a torch model has to leave in the graph."""
    del settings
    return "normalisation"


def attach(frozen: Frozen, rows: NetworkRows, task: Task, settings: Settings) -> Attached:
    """The frozen model with M·S noisy copies.

    Raises ModelError where no normalisation is left in the graph, saying what would keep it, and
    where the graph cannot be differentiated; FitError for too few rows and where every member is
    rejected.
    """
    from posthoc.network.attach import PROBE, Attached, attach, check_room, stored
    from posthoc.network.fold import Noise
    from posthoc.network.sites import find_normalisations, normalisation_hint

    del task
    if settings.members * settings.samples < 2:
        raise FitError("abnn needs two samples or more in all: raise members or samples")
    probe = rows.take(slice(0, PROBE)).inputs
    sites = find_normalisations(frozen.model, probe, output=frozen.z)
    if not sites:
        raise ModelError(f"{frozen.file}: {normalisation_hint(frozen.model)}")
    from posthoc.methods.network.abnn_training import train

    count = settings.members * settings.samples
    check_room({s.node: 2 * count * prod(_shape(s, settings.noise)) for s in sites})
    found, said = train(frozen, sites, rows, settings)
    rng = np.random.default_rng([settings.seed, 2])
    noises: dict[str, Noise] = {}
    tensors: dict[str, Array] = {}
    for i, site in enumerate(sites):
        scale, shift = (np.stack([m[i][k] for m in found]) for k in (0, 1))
        eps = draws(rng, _shape(site, settings.noise), len(found), settings.samples)
        scale_s = site.along(scale.repeat(settings.samples, 0))
        shift_s = site.along(shift.repeat(settings.samples, 0))
        gain = (1.0 + scale_s) * (1.0 + settings.alpha * eps)
        assert site.beta is not None
        offset = site.along(site.beta[None]) * (1.0 - gain) + shift_s
        noises[site.tensor] = Noise(stored(gain), stored(offset))
        tensors |= {f"scale/{site.tensor}": scale, f"shift/{site.tensor}": shift}
    note = f"{len(found)} members with {settings.samples} draws of noise on {len(sites)} "
    note += f"normalisations ({', '.join(sorted({s.kind for s in sites}))})"
    if said["rejected"]:
        note += f"; {said['rejected']} lost more than half a point of accuracy and were left out"
    note += f"; {said['guard']}" if "guard" in said else ""
    made = attach(frozen, {s.tensor: s for s in sites}, noises, rows, note=note)
    return Attached(made, tensors, {**settings.model_dump(), "sites": len(sites), **said})


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """See `posthoc.methods.network.members.fit`."""
    del head, settings
    return members.fit("abnn", rows, task)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the copies add to the outputs of N rows (float64 definition)."""
    return members.spread(state, phi, z)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    return members.emit(g, state, phi, z)


def _shape(site: Site, noise: str) -> tuple[int, ...]:
    """The shape of one draw of noise, to broadcast against a row of a site."""
    if noise == "channel":
        return site.along(np.zeros((1, site.channels))).shape[1:]
    if -1 in site.shape:
        raise ModelError(
            f"noise per element needs maps of one size, and those at {site.node!r} have any; "
            "take --set noise=channel"
        )
    return site.shape


def draws(rng: np.random.Generator, shape: tuple[int, ...], members: int, samples: int) -> Array:
    """Standard normal numbers (M·S)×shape, member by member, each member's in antithetic pairs: the
    mean over a member's draws is zero where S is even, so that its centre is the member without
    noise. Of an odd S the last draw stands alone."""
    half = rng.standard_normal((members, -(-samples // 2), *shape), np.float32)
    pairs = np.stack([half, -half], 2).reshape(members, -1, *shape)
    return pairs[:, :samples].reshape(members * samples, *shape)


def guard(frozen: Array, member: Array) -> tuple[float, bool]:
    """(one-sided 95 % upper bound of the loss in accuracy, whether the member is rejected), from
    whether each held-out row (or image: its share) is right under both, paired.

    The bound can stay below half a point only with some 3,200 rows; with fewer a member is rejected
    where the loss is surely larger, by the lower bound.
    """
    loss = np.asarray(frozen, np.float64) - np.asarray(member, np.float64)
    n = len(loss)
    error = NORMAL95 * loss.std() / np.sqrt(n)
    bound = float(loss.mean() + error)
    return bound, bool((bound if n >= ENOUGH else loss.mean() - error) > LOSS)


def class_weights(rng: np.random.Generator, classes: int, prior: float) -> Array:
    """η of one member: 1, but ``prior`` for floor(sqrt(C)) classes drawn at random."""
    weights = np.ones(classes, np.float32)
    weights[rng.choice(classes, int(np.sqrt(classes)), replace=False)] = prior
    return weights
