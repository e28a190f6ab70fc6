"""MC-batch-norm: the statistics of random mini-batches in place of the running ones.

Teye, Azizpour & Smith 2018 (arXiv:1802.06455). For each of S mini-batches of module rows the
network runs with that batch's mean and variance in every BatchNormalization, and these are kept: S
fixed networks that every row meets. No labels and no training.

With h = γu + β the output of a normalisation, m and v its mean and variance over the batch, and
running variance + ε = σ², the batch's own normalisation of the same input is g·h + c with
g = (v/γ² + ε/σ²)^(-1/2) and c = β − m·g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    name="mc_batch_norm",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "network"}),
    summary="batch normalisation with the statistics of random mini-batches of module rows",
    paper=Paper(
        "Bayesian Uncertainty Estimation for Batch Normalized Deep Networks",
        2018,
        "https://arxiv.org/abs/1802.06455",
    ),
    passes=16,
    preserves=False,
    either=True,
)
ROWS = 5_000  # module rows that are read, at most


class Settings(BaseModel):
    """``samples`` S mini-batches of ``batch`` rows each, drawn with ``seed``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    samples: int = Field(default=16, ge=2)
    batch: int = Field(default=32, ge=2)
    seed: int = Field(default=0, ge=0)


def keep(settings: Settings) -> Keep:
    """What the export of a torch model has to leave in the graph."""
    del settings
    return "normalisation"


def attach(frozen: Frozen, rows: NetworkRows, task: Task, settings: Settings) -> Attached:
    """The frozen model with its S copies. Raises ModelError where no BatchNormalization is left in
    the graph, saying what would keep it, and FitError for fewer rows than a mini-batch."""
    from posthoc.network.attach import PROBE, Attached, attach, stored
    from posthoc.network.fold import Noise
    from posthoc.network.sites import find_normalisations, normalisation_hint

    del task
    found = find_normalisations(frozen.model, rows.take(slice(0, PROBE)).inputs, output=frozen.z)
    sites = [s for s in found if s.kind == "batch"]
    if not sites:
        others = ", ".join(sorted({s.kind for s in found}))
        raise ModelError(
            f"{frozen.file} has {others} normalisation, and no batch statistics to vary; abnn "
            "works on it"
            if found
            else f"{frozen.file}: {normalisation_hint(frozen.model)}"
        )
    if len(rows) < settings.batch:
        raise FitError(
            f"mc_batch_norm needs at least {settings.batch} module rows and has {len(rows)}"
        )
    gains, offsets = _statistics(frozen, sites, rows, settings)
    noises = {
        s.tensor: Noise(stored(s.along(gains[s.tensor])), stored(s.along(offsets[s.tensor])))
        for s in sites
    }
    note = (
        f"statistics of {settings.samples} mini-batches of {settings.batch} rows in {len(sites)} "
    )
    note += "batch normalisations"
    made = attach(frozen, {s.tensor: s for s in sites}, noises, rows, note=note)
    tensors = {f"gain/{k}": v for k, v in gains.items()}
    tensors |= {f"offset/{k}": v for k, v in offsets.items()}
    return Attached(made, tensors, {"sites": len(sites), **settings.model_dump()})


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """See `posthoc.methods.network.members.fit`."""
    del head, settings
    return members.fit("mc_batch_norm", rows, task)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the copies add to the outputs of N rows (float64 definition)."""
    return members.spread(state, phi, z)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    return members.emit(g, state, phi, z)


def _statistics(
    frozen: Frozen, sites: list[Site], rows: NetworkRows, settings: Settings
) -> tuple[dict[str, Array], dict[str, Array]]:
    """g and c, S×C, of every site: one pass for each mini-batch, each normalisation on what the
    ones before it made of the batch."""
    import torch

    from posthoc.network.autograd import Network

    network = Network(frozen.model, [frozen.z])
    gains: dict[str, list[Array]] = {s.tensor: [] for s in sites}
    offsets: dict[str, list[Array]] = {s.tensor: [] for s in sites}

    def hook(site: Site) -> Any:
        axes = [a for a in range(len(site.shape) + 1) if a != site.axis]
        shape = [1] * (len(site.shape) + 1)
        shape[site.axis] = -1
        assert site.gamma is not None and site.beta is not None and site.variance_eps is not None
        gamma, beta = site.gamma, site.beta
        variance, eps = site.variance_eps

        def apply(h: Any) -> Any:
            wide = h.to(torch.float64)
            m, v = wide.mean(axes).numpy(), wide.var(axes, unbiased=False).numpy()
            with np.errstate(divide="ignore", invalid="ignore"):
                g = 1.0 / np.sqrt(v / gamma**2 + eps / (variance + eps))
            c = beta - m * g
            g, c = np.where(gamma == 0, 1.0, g), np.where(gamma == 0, 0.0, c)
            gains[site.tensor].append(g)
            offsets[site.tensor].append(c)
            made = wide * torch.as_tensor(g).reshape(shape) + torch.as_tensor(c).reshape(shape)
            return made.to(h.dtype)

        return apply

    hooks = {s.tensor: hook(s) for s in sites}
    rng = np.random.default_rng(settings.seed)
    with torch.no_grad():
        for _ in range(settings.samples):
            part = rows.take(rng.choice(len(rows), settings.batch, replace=False)).inputs
            network({k: torch.as_tensor(part[k]) for k in network.inputs}, hooks)
    return (
        {k: np.stack(v) for k, v in gains.items()},
        {k: np.stack(v) for k, v in offsets.items()},
    )
