"""MC-dropout: the network's own dropout, or dropout put in at named tensors, left on.

S masks are drawn once from a seed and kept: every row meets the same S thinned networks (Gal &
Ghahramani 2016, arXiv:1506.02142). For each unit the S uniform numbers behind its masks are
stratified, so that it is dropped in a share of the samples as near to its rate as S allows. What
lies before the first dropout is computed once.

Without a rate, dropout that the model was trained with keeps its own. At a named tensor the rate
is found without labels: the largest at which the mean total variation between the mixture and the
frozen prediction, and the share of rows whose label it turns, are at most ε on module rows. In a
regression: at which the epistemic standard deviation is at most ε times that of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
_STEPS = 12  # halvings of the range of rates
_MOST = 0.9


def _names(given: Any) -> Any:
    return [n.strip() for n in given.split(",") if n.strip()] if isinstance(given, str) else given


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
        return {
            s.tensor: Noise(gain=stored((u >= p) / (1.0 - p)))
            for s, u, p in zip(sites, uniforms, rates, strict=True)
        }

    said: dict[str, Any] = {"sites": [s.node for s in sites], "samples": settings.samples}
    if settings.rate is not None:
        rates = [settings.rate] * len(sites)
    elif settings.at:
        rate = _largest(
            _distance(frozen, masks, len(sites), rows.take(slice(0, ROWS)), task), settings
        )
        rates = [rate] * len(sites)
        said |= {"epsilon": settings.epsilon, "uncalibrated": True}
    else:
        rates = [float(s.rate or 0.0) for s in sites]
    said["rates"] = rates
    note = f"{settings.samples} fixed dropout masks at {', '.join(said['sites'][:4])}"
    made = attach(frozen, {s.tensor: s for s in sites}, masks(rates), rows, note=note)
    return Attached(made, {}, said)


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """See `posthoc.methods.network.members.fit`."""
    del head
    return members.fit("mc_dropout", rows, task, settings.samples)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the thinned networks add to the outputs of N rows (float64 definition)."""
    return members.spread(state, phi, z)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    return members.emit(g, state, phi, z)


def _uniforms(sites: Sequence[Site], settings: Settings) -> list[Array]:
    """For each site S×… numbers in [0, 1), stratified over S for each unit."""
    rng, found = np.random.default_rng(settings.seed), []
    for site in sites:
        shape = site.shape
        if site.whole or settings.channels:
            shape = site.along(np.zeros((1, site.channels))).shape[1:]
        if -1 in shape:
            raise ModelError(
                f"dropout at {site.node!r} acts on maps of any size ({shape}), and masks are "
                "stored; drop whole channels with --set channels=true"
            )
        drawn = rng.random((settings.samples, *shape), np.float32)
        strata = rng.permuted(
            np.broadcast_to(
                np.arange(settings.samples, dtype=np.float32).reshape(-1, *[1] * len(shape)),
                drawn.shape,
            ),
            axis=0,
        )
        found.append((strata + drawn) / settings.samples)
    return found


def _distance(
    frozen: Frozen,
    masks: Callable[[Sequence[float]], dict[str, Any]],
    sites: int,
    rows: NetworkRows,
    task: Task,
) -> Callable[[float], float]:
    """How far the mixture at a rate is from the frozen prediction: what ε bounds."""
    from posthoc.links import softmax
    from posthoc.network.attach import MEMBERS, channel_axis
    from posthoc.network.fold import sampled, separate
    from posthoc.pixels import pixels
    from posthoc.runtime import open_session

    axis = channel_axis(frozen)
    first = masks([0.5] * sites)
    count = next(len(n.terms()["gain"]) for n in first.values())
    probe = rows.take(slice(0, 8)).inputs
    model = sampled(frozen.model, frozen.z, first, MEMBERS, inputs=True, axis=axis, rows=probe)
    import onnx

    from posthoc.model.probe import with_outputs

    session = open_session(with_outputs(onnx.load_from_string(model), [frozen.z]))
    block = max(1, 256 // count)

    def flat(z: Array) -> Array:
        return pixels(z, axis).reshape(-1, z.shape[axis]).astype(np.float64)

    def distance(rate: float) -> float:
        noise = {f"{t}/gain": n.gain for t, n in masks([rate] * sites).items()}
        off, turned, n = 0.0, 0.0, 0
        for i in range(0, len(rows), block):
            part = rows.take(slice(i, i + block)).inputs
            z, found = session.run([frozen.z, MEMBERS], {**part, **noise})
            each = [flat(m) for m in separate(found, count, axis)]
            own = flat(z)
            n += len(own)
            if task == "regression":
                scale = np.maximum(own.std(0), 1e-12)
                off += float((np.std(each, axis=0) / scale).mean(1).sum())
                continue
            if own.shape[1] == 1:
                own, each = _pair(own), [_pair(m) for m in each]
            p, q = softmax(own), np.mean([softmax(m) for m in each], axis=0)
            off += float(0.5 * np.abs(p - q).sum())
            turned += float((p.argmax(1) != q.argmax(1)).sum())
        return max(off, turned) / n

    return distance


def _pair(z: Array) -> Array:
    return np.concatenate([np.zeros_like(z), z], 1)


def _largest(distance: Callable[[float], float], settings: Settings) -> float:
    """The largest rate within ε, to a thousandth of the range on a logarithmic scale."""
    low, high = 1.0 / settings.samples, _MOST
    if distance(low) > settings.epsilon:
        raise FitError(
            f"dropping a unit in one of {settings.samples} samples moves the predictions by more "
            f"than epsilon={settings.epsilon:g} already; give a rate, a larger epsilon or more "
            "samples"
        )
    if distance(high) <= settings.epsilon:
        return high
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if distance(middle) <= settings.epsilon else (low, middle)
    return low
