"""The state of `run_length` as one JSON object, checked when it is read back."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np

from calibration.drift.run_length import Model, Settings, State
from calibration.drift.saved import Saved, damaged, read, text_of
from calibration.drift.standardise import Row, Scale, check_learning

M = TypeVar("M", bound=Model)
_MOST = 1e100  # of a statistic, so that products of two are finite
Kind = TypeVar("Kind")  # unbound: pydantic has no schema of a protocol


class SavedState(Saved, Generic[Kind]):
    """`State` in JSON: arrays are nested lists."""

    model: Kind
    settings: Settings
    scale: Scale
    hazard: list[float]
    t: int
    lengths: list[int]
    log_weight: list[float]
    stats: list[list[list[float]]]
    learning: tuple[Row, ...] | None


def dump(kind: type[SavedState[M]], name: str, state: State[M]) -> str:
    """The state as one JSON object."""
    return text_of(
        kind(
            detector=name,
            model=state.model,
            settings=state.settings,
            scale=state.scale,
            hazard=state.hazard.tolist(),
            t=state.t,
            lengths=state.lengths.tolist(),
            log_weight=state.log_weight.tolist(),
            stats=state.stats.tolist(),
            learning=state.learning,
        )
    )


def load(kind: type[SavedState[M]], name: str, text: str) -> State[M]:
    """The inverse of `dump`. Raises DataError for anything else."""
    saved = read(kind, name, text)
    model, settings, dims = saved.model, saved.settings, len(saved.scale.centre)
    try:
        lengths = np.array(saved.lengths, np.int64)
        log_weight, hazard = np.array(saved.log_weight), np.array(saved.hazard)
        stats = np.array(saved.stats, np.float64)
    except (ValueError, OverflowError) as e:
        raise damaged(name, "arrays of no one shape") from e
    k = len(lengths)
    if not 1 <= k <= settings.keep or len(np.unique(lengths)) != k or lengths.min() < 0:
        raise damaged(name, "run lengths")
    if log_weight.shape != (k,) or not abs(np.exp(np.minimum(log_weight, 1)).sum() - 1) < 1e-6:
        raise damaged(name, "weights")
    shaped = stats.shape == (k, dims, len(model.prior())) and np.abs(stats).max() < _MOST
    if not shaped or not model.holds(stats):
        raise damaged(name, "statistics")
    if saved.t < 0 or not len(hazard) or not ((hazard > 0) & (hazard < 1)).all():
        raise damaged(name, "time or hazard")
    check_learning(saved.learning, dims, settings.relearn)
    return State(
        model,
        settings,
        saved.scale,
        hazard,
        saved.t,
        lengths,
        log_weight,
        stats,
        saved.learning,
    )
