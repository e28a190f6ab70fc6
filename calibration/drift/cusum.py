"""CUSUM: two one-sided cumulative sums of clipped, standardised observations.

Page 1954, "Continuous inspection schemes", Biometrika 41. With z clipped to ±``clip``, each
dimension keeps ``up = max(0, up + z - slack)`` and ``down = max(0, down - z - slack)``; a sum above
``limit`` is an alarm, and the change is put where that sum last left 0. Clipping bounds what one
outlier adds to ``clip - slack``, so that more than ``limit / (clip - slack)`` of them must come
nearly in a row. It watches the mean only, and only for shifts well above ``slack`` spreads:
smaller ones are found by feeding means of windows, whose spread is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from calibration.drift.detector import Found
from calibration.drift.saved import Saved, damaged, read, text_of
from calibration.drift.standardise import (
    LEAST,
    RELEARN,
    Observation,
    Row,
    Scale,
    check_learning,
    observed,
    reference_of,
    scale_of,
    standardised,
)
from posthoc.contract import Array, DataError

NAME = "cusum"


@dataclass(frozen=True, slots=True)
class Settings:
    """In standardised units: what a step must exceed, the limit of a sum, and where observations
    are clipped. ``relearn``: observations of a new regime that are learnt from.

    Raises DataError where they could never give an alarm.
    """

    slack: float
    limit: float
    clip: float
    relearn: int

    def __post_init__(self) -> None:
        if not (0 < self.slack < self.clip < math.inf and 0 < self.limit < math.inf):
            raise DataError(
                f"CUSUM needs 0 < slack < clip and a limit above 0, not slack {self.slack}, clip "
                f"{self.clip}, limit {self.limit}: it could never give an alarm"
            )
        if self.relearn < LEAST:
            raise DataError(f"relearn is {self.relearn} observations where {LEAST} are the least")


@dataclass(frozen=True, slots=True)
class State:
    """Sums D and, for each, the index of the first observation since it was 0; ``t`` observations
    so far. ``learning`` holds a new regime's observations until they suffice."""

    settings: Settings
    scale: Scale
    t: int
    up: Row
    down: Row
    up_since: tuple[int, ...]
    down_since: tuple[int, ...]
    learning: tuple[Row, ...] | None


def start(
    reference: Array,
    *,
    slack: float = 1.0,
    limit: float = 5.0,
    clip: float = 2.0,
    relearn: int = RELEARN,
) -> State:
    """The state after a reference of N or N×D points.

    Raises DataError as `standardise.reference_of` and `standardise.scale_of`, and for `Settings`.
    """
    settings = Settings(float(slack), float(limit), float(clip), relearn)
    return _fresh(settings, scale_of(reference_of(reference)), 0)


def step(state: State, x: Observation) -> tuple[State, Found]:
    """The state after one more observation (a number, or D), and what it showed.

    Raises DataError for NaN and infinity.
    """
    row, t, settings = observed(x, len(state.up)), state.t, state.settings
    if state.learning is not None:
        return _learn(state, (*state.learning, row))
    slack, clip = settings.slack, settings.clip
    up, down, up_since, down_since = [], [], [], []
    for d, z in enumerate(standardised(state.scale, row)):
        z = clip if z > clip else -clip if z < -clip else z
        rising, falling = state.up[d] + z - slack, state.down[d] - z - slack
        up.append(rising if rising > 0 else 0.0)
        down.append(falling if falling > 0 else 0.0)
        up_since.append(state.up_since[d] if rising > 0 else t + 1)
        down_since.append(state.down_since[d] if falling > 0 else t + 1)
    highest = max(*up, *down)
    alarm, change = highest > settings.limit, None
    if alarm:
        place = (up + down).index(highest)
        change = (up_since + down_since)[place]
    new = State(
        settings,
        state.scale,
        t + 1,
        tuple(up),
        tuple(down),
        tuple(up_since),
        tuple(down_since),
        () if alarm else None,
    )
    return new, Found(alarm, min(1.0, highest / settings.limit), change)


class _Saved(Saved):
    state: State


def to_json(state: State) -> str:
    """The state as one JSON object."""
    return text_of(_Saved(detector=NAME, state=state))


def from_json(text: str) -> State:
    """The inverse of `to_json`. Raises DataError for anything else."""
    state = read(_Saved, NAME, text).state
    dims = len(state.scale.centre)
    sums, since = state.up + state.down, state.up_since + state.down_since
    sized = all(len(p) == dims for p in (state.up, state.down, state.up_since, state.down_since))
    if not sized or min(sums) < 0 or not 0 <= min(since) <= max(since) <= state.t:
        raise damaged(NAME, "sums")
    check_learning(state.learning, dims, state.settings.relearn)
    return state


def _fresh(settings: Settings, scale: Scale, t: int) -> State:
    dims = len(scale.centre)
    zero, since = (0.0,) * dims, (t,) * dims
    return State(settings, scale, t, zero, zero, since, since, None)


def _learn(state: State, learning: tuple[Row, ...]) -> tuple[State, Found]:
    """After one more observation of a new regime; the last of them starts the sums anew."""
    t = state.t + 1
    if len(learning) >= state.settings.relearn:
        new = _fresh(state.settings, scale_of(np.array(learning), state.scale), t)
    else:
        new = replace(state, t=t, learning=learning)
    return new, Found(False, 0.0, None, True)
