"""Bayesian online change points: a posterior over how long the present segment has lasted.

Adams & MacKay 2007, arXiv:0710.3742, algorithm 1. A hypothesis is a run length r, the observations
since the last change, with a weight and the statistics of those r observations. One observation x

* multiplies each weight by the hypothesis's predictive density of x,
* lets it grow to r + 1 with probability 1 - H(r + 1), H(n) being the chance that a segment that
  has n observations ends there,
* and gathers what ended as one new hypothesis r = 0, which knows only the prior.

At most ``keep`` hypotheses are kept: the new one takes the place of the least likely, so a step
costs O(keep) whatever the length of the stream. H is looked up by run length, not by place.

One outlier must not look like a change: the predictive is (1 - contamination) of the model's and
``contamination`` of N(0, broad²), the same for every hypothesis, in each dimension. What no
hypothesis explains then favours none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.drift.detector import Found
from calibration.drift.standardise import (
    FARTHEST,
    LEAST,
    Observation,
    Row,
    Scale,
    observed,
    scale_of,
    standardised,
)
from posthoc.contract import F64, Array, DataError

_LOG_2PI = math.log(2 * math.pi)


class Model(Protocol):
    """What a segment's observations follow: S statistics a dimension, dimensions independent."""

    def prior(self) -> F64:
        """Statistics S of no observation, the same for every dimension."""

    def log_density(self, stats: F64, lengths: Array, z: F64) -> F64:
        """Log predictive density K×D of z (D) under statistics K×D×S of ``lengths`` K points."""

    def updated(self, stats: F64, lengths: Array, z: F64) -> F64:
        """Statistics K×D×S after z."""

    def holds(self, stats: F64) -> bool:
        """Whether K×D×S finite numbers can be statistics of this model."""


M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a change is looked for, in standardised units.

    ``keep`` hypotheses; ``contamination`` and ``broad`` as on the page; observations farther than
    ``clip`` count as this far. There is an alarm when run lengths from ``least`` to ``recent``
    have together a probability of at least ``threshold``: the shortest rest on too little, and a
    change that takes longer to show is left to detectors of slow drift.
    ``relearn``: observations of a new regime that are learnt from. DataError for impossible ones.
    """

    keep: int
    contamination: float
    broad: float
    clip: float
    least: int
    recent: int
    threshold: float
    relearn: int

    def __post_init__(self) -> None:
        possible = {
            "keep >= 2": self.keep >= 2,
            "0 <= contamination < 1": 0 <= self.contamination < 1,
            "broad > 0": 0 < self.broad < math.inf,
            f"0 < clip <= {FARTHEST:g}": 0 < self.clip <= FARTHEST,
            "0 <= least <= recent <= relearn": 0 <= self.least <= self.recent <= self.relearn,
            "0 < threshold < 1": 0 < self.threshold < 1,
            f"relearn >= {LEAST}": self.relearn >= LEAST,
        }
        wrong = [rule for rule, kept in possible.items() if not kept]
        if wrong:
            raise DataError(f"a change-point detector needs {wrong[0]}: {self}")


@dataclass(frozen=True, slots=True, eq=False)
class State(Generic[M]):
    """K run lengths with log weights K, whose sum is 1, and statistics K×D×S; ``t`` observations
    so far. ``hazard[n-1]`` is the chance that a segment ends when it has n observations, its last
    entry that of longer ones too. ``learning`` holds a new regime's observations until they
    suffice, and is None while changes are looked for.
    """

    model: M
    settings: Settings
    scale: Scale
    hazard: F64
    t: int
    lengths: NDArray[np.int64]
    log_weight: F64
    stats: F64
    learning: tuple[Row, ...] | None


def begin(
    fit: Callable[[F64], M],
    reference: F64,
    settings: Settings,
    hazard: float | Sequence[float] | F64,
    t: int = 0,
    before: Scale | None = None,
) -> State[M]:
    """The state whose segment so far is the reference N×D; ``fit`` gives the model from the
    reference as standardised. Raises DataError as `scale_of`, for a hazard that is no chance, and
    a reference shorter than ``recent``."""
    table = np.atleast_1d(np.asarray(hazard, np.float64))
    if table.ndim != 1 or not len(table) or not ((table > 0) & (table < 1)).all():
        raise DataError("the hazard is one chance, or one a run length, strictly between 0 and 1")
    if len(reference) < settings.recent:
        raise DataError(
            f"the reference has {len(reference)} points where recent changes are those of the last "
            f"{settings.recent}: give more points, or a smaller recent"
        )
    scale = scale_of(reference, before)
    with np.errstate(over="ignore"):
        z = np.clip((reference - scale.centre) / scale.spread, -settings.clip, settings.clip)
    model = fit(z)
    stats = np.tile(model.prior(), (1, z.shape[1], 1))
    for i, row in enumerate(z):
        stats = model.updated(stats, np.array([i]), row)
    length = np.array([len(z)])
    return State(model, settings, scale, table, t, length, np.zeros(1), stats, None)


def step(state: State[M], x: Observation, fit: Callable[[F64], M]) -> tuple[State[M], Found]:
    """One observation: see `calibration.drift.detector`."""
    row, settings, t = observed(x, len(state.scale.centre)), state.settings, state.t + 1
    if state.learning is not None:
        learning = (*state.learning, row)
        if len(learning) < settings.relearn:
            new = replace(state, t=t, learning=learning)
        else:
            new = begin(fit, np.array(learning), settings, state.hazard, t, before=state.scale)
        return new, Found(False, 0.0, None, True)
    z = np.array(standardised(state.scale, row))
    lengths, log_weight, stats = advance(state, z)
    recent = np.flatnonzero((lengths >= settings.least) & (lengths <= settings.recent))
    evidence = min(1.0, float(np.exp(log_weight[recent]).sum()))
    alarm, change = evidence >= settings.threshold, None
    if alarm:
        change = t - int(lengths[recent[log_weight[recent].argmax()]])
    new = State(
        state.model,
        settings,
        state.scale,
        state.hazard,
        t,
        lengths,
        log_weight,
        stats,
        () if alarm else None,
    )
    return new, Found(alarm, evidence, change)


def advance(state: State[M], z: F64) -> tuple[NDArray[np.int64], F64, F64]:
    """Run lengths, log weights and statistics after a standardised observation z (D)."""
    s, model = state.settings, state.model
    z = np.minimum(np.maximum(z, -s.clip), s.clip)
    density = model.log_density(state.stats, state.lengths, z)
    if s.contamination > 0:
        outlier = math.log(s.contamination / s.broad) - 0.5 * (_LOG_2PI + (z / s.broad) ** 2)
        density = np.logaddexp(density + math.log1p(-s.contamination), outlier)
    joint = state.log_weight + density.sum(axis=1)
    lengths = state.lengths + 1
    hazard = state.hazard[np.minimum(lengths, len(state.hazard)) - 1]
    ended, grown = _log_sum(joint + np.log(hazard)), joint + np.log1p(-hazard)
    stats = model.updated(state.stats, state.lengths, z)
    if len(lengths) < s.keep:
        lengths, grown = np.append(lengths, 0), np.append(grown, ended)
        stats = np.concatenate((stats, np.tile(model.prior(), (1, len(z), 1))))
    else:  # all three are new arrays: the state before stays as it was
        slot = int(grown.argmin())
        lengths[slot], grown[slot], stats[slot] = 0, ended, model.prior()
    return lengths, grown - _log_sum(grown), stats


def _log_sum(a: F64) -> float:
    top = float(a.max())
    return top + math.log(float(np.exp(a - top).sum()))
