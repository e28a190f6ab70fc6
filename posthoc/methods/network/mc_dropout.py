"""MC-dropout: the network's own dropout, or dropout put in at named tensors, left on.

S masks are drawn once from a seed and kept: every row meets the same S thinned networks (Gal &
Ghahramani 2016, arXiv:1506.02142). For each unit the S uniform numbers behind its masks are
stratified, so that it is dropped in a share of the samples as near to its rate as S allows, and
what is kept is divided by the share that keeps it: the masks' mean is 1 in every unit, so that the
copies lie about the network. What lies before the first dropout is computed once.

Without a rate, dropout that the model was trained with keeps its own. At a named tensor the rate
is found without labels: the largest at which the mean total variation between the mixture and the
frozen prediction, and the share of rows whose label it turns, are at most ε on module rows. In a
regression: at which the epistemic standard deviation is at most ε times that of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

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
    name="mc_dropout",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "network"}),
    summary="the network's own dropout left on, or dropout at named tensors; masks are fixed",
    paper=Paper(
        "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning",
        2016,
        "https://arxiv.org/abs/1506.02142",
    ),
    passes=20,
    preserves=False,
    either=True,
)
ROWS = 1000  # module rows that a rate is judged on, at most
_SHOWN = 4  # sites that are named in a note


def _names(given: Any) -> Any:
    names = given.split(",") if isinstance(given, str) else given
    return tuple(dict.fromkeys(n.strip() for n in names if n.strip()))


class Settings(BaseModel):
    """``at`` are the names of tensors, or nothing for the dropouts that are found; ``samples`` S;
    ``rate`` of all of them (default: their own, or by ``epsilon`` at named tensors); ``channels``
    drops channels whole; ``seed`` of the masks."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    at: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    samples: int = Field(default=20, ge=2)
    rate: float | None = Field(default=None, gt=0, lt=1)
    epsilon: float = Field(default=0.01, gt=0, lt=1)
    channels: bool = False
    seed: int = Field(default=0, ge=0)

    @field_validator("epsilon")
    @classmethod
    def _of_the_search(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("rate") is not None:
            raise ValueError("the rate is given; leave it out")
        if not info.data.get("at"):
            raise ValueError("it finds the rate at named tensors; name them with --set at=NAME")
        return value


def keep(settings: Settings) -> Keep | None:
    """What the export of a torch model has to leave in the graph: its dropouts, where they are
    looked for."""
    return None if settings.at else "dropout"


def attach(frozen: Frozen, rows: NetworkRows, task: Task, settings: Settings) -> Attached:
    """The frozen model with its S thinned copies.

    Raises ModelError where the model has no dropout and no tensor is named, and what
    `posthoc.network.attach.attach` raises.
    """
    from posthoc.network.attach import PROBE, Attached, attach, stored
    from posthoc.network.fold import Noise
    from posthoc.network.sites import find_dropouts, named

    probe = rows.take(slice(0, PROBE)).inputs
    if settings.at:
        sites = named(frozen.model, settings.at, probe)
    else:
        sites = find_dropouts(frozen.model, probe, output=frozen.z)
    if not sites:
        raise ModelError(
            f"{frozen.file} has no dropout: exporters remove it from a model in evaluation mode. "
            "Give the torch module (module:factory), name tensors with --set at=NAME,NAME, or "
            "take --method head_dropout"
        )
    uniforms = _uniforms(sites, settings)

    def masks(rates: Sequence[float]) -> dict[str, Noise]:
        each = zip(sites, uniforms, rates, strict=True)
        return {s.tensor: Noise(gain=stored(_mask(u, p, s))) for s, u, p in each}

    said: dict[str, Any] = {}
    if settings.rate is not None:
        rates = [settings.rate] * len(sites)
    elif settings.at:
        from posthoc.methods.network.dropout_rate import distance, largest

        judges = rows.take(slice(0, ROWS))
        distances = distance(frozen, masks, len(sites), judges, task)
        rate, said = largest(distances, settings.epsilon, settings.samples)
        rates = [rate] * len(sites)
        said |= {"judges": len(judges)}
    else:
        rates = [float(s.rate or 0.0) for s in sites]
    noises = masks(rates)
    if all(np.all(n.terms()["gain"]) for n in noises.values()):
        raise FitError(
            f"mc_dropout: at rate {max(rates):.3g} no unit is dropped in any of "
            f"{settings.samples} samples; give a larger rate or epsilon, or more samples"
        )
    said |= {"sites": [s.node for s in sites], "rates": rates, "samples": settings.samples}
    said |= {"channels": settings.channels, "seed": settings.seed}
    more = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
    note = f"{settings.samples} fixed dropout masks at {', '.join(said['sites'][:_SHOWN])}{more}"
    made = attach(frozen, {s.tensor: s for s in sites}, noises, rows, note=note)
    return Attached(made, {}, said)


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """See `posthoc.methods.network.members.fit`."""
    del head, settings
    return members.fit("mc_dropout", rows, task)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the thinned networks add to the outputs of N rows (float64 definition)."""
    return members.spread(state, phi, z)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    return members.emit(g, state, phi, z)


def _mask(uniforms: Array, rate: float, site: Site) -> Array:
    """S×… masks. Each unit is divided by the share of the samples that keep it, so that its mean
    over the samples is 1 where S·rate is no whole number too."""
    kept = uniforms >= rate
    share = kept.mean(0)
    if not share.all():
        raise FitError(
            f"mc_dropout: at rate {rate:.4g} a unit at {site.node!r} is dropped in all of "
            f"{len(kept)} samples; give a smaller rate or more samples"
        )
    return np.asarray(kept / share)


def _uniforms(sites: Sequence[Site], settings: Settings) -> list[Array]:
    """For each site S×… numbers in [0, 1), stratified over S for each unit."""
    from posthoc.network.attach import check_room

    shapes: list[tuple[int, ...]] = []
    for site in sites:
        shape = site.shape
        if (site.whole or settings.channels) and site.channels > 0:
            shape = site.along(np.zeros((1, site.channels))).shape[1:]
        if -1 in shape:
            raise ModelError(
                f"dropout at {site.node!r} acts on maps of any size ({shape}), and masks are "
                "stored; drop whole channels with --set channels=true"
                if site.channels > 0
                else f"{site.node!r} has no fixed number of channels ({shape}), and masks are "
                "stored; name another tensor"
            )
        shapes.append(shape)
    check_room({x.node: settings.samples * prod(d) for x, d in zip(sites, shapes, strict=True)})
    rng, found = np.random.default_rng(settings.seed), []
    for shape in shapes:
        drawn = rng.random((settings.samples, *shape), np.float32)
        strata = np.arange(settings.samples, dtype=np.float32).reshape(-1, *[1] * len(shape))
        strata = rng.permuted(np.broadcast_to(strata, drawn.shape), axis=0)
        found.append((strata + drawn) / settings.samples)
    return found
