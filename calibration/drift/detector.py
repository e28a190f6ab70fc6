"""What every change-point detector is, and which there are.

A detector is a module of four functions over a small frozen state. All of them treat a stream of
scalars, or of D independent dimensions, in the same way:

* ``start(reference, ...)`` learns what is normal from about 200 points (`standardise`);
* ``step(state, x)`` takes one observation and says what was `Found`;
* after an alarm the next ``relearn`` observations are collected as the new regime, with no alarm
  meanwhile; the detector then starts again from them, as if they were its reference;
* ``to_json`` and ``from_json`` save and restore a state; its future is then the same bit by bit.

A missing observation is simply not fed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from calibration.drift.standardise import Observation
from posthoc.contract import Array, DataError

DETECTORS = {
    "cusum": "calibration.drift.cusum",
    "dsm": "calibration.drift.dsm",
    "bocd": "calibration.drift.bocd",
}
# By the table of `python -m bench drift`: as few false alarms as `dsm` and as many shifts found, at
# a twentieth of its cost. `dsm` is for smaller shifts and for changes of spread.
DEFAULT = "cusum"


@dataclass(frozen=True, slots=True)
class Found:
    """What one observation showed.

    ``evidence`` lies in 0…1: of ``bocd`` and ``dsm`` the posterior probability that the stream
    changed in the last ``recent`` observations, of ``cusum`` its sum over its limit, which is no
    probability. ``change`` is the estimated index of the first observation after the change,
    counted from 0 at the start, where there is an alarm. ``learning``: the observation was
    collected as part of a new regime, and not tested.
    """

    alarm: bool
    evidence: float
    change: int | None = None
    learning: bool = False


class Detector(Protocol):
    """The module of a detector, by any name of `DETECTORS`."""

    def start(self, reference: Array, **settings: Any) -> Any:
        """The state after a reference of N or N×D points; DataError for one that will not do, or
        settings out of their range."""

    def step(self, state: Any, x: Observation) -> tuple[Any, Found]:
        """The state after one more observation, and what it showed; DataError for NaN or
        infinity, which leave the state as it was."""

    def to_json(self, state: Any) -> str:
        """The state as one JSON object, without NaN or infinity."""

    def from_json(self, text: str) -> Any:
        """The inverse of ``to_json``; DataError for anything else."""


def detector(name: str) -> Detector:
    """The detector of that name. Raises DataError for an unknown one."""
    if name not in DETECTORS:
        raise DataError(f"there is no drift detector {name!r}: use one of {', '.join(DETECTORS)}")
    return cast(Detector, import_module(DETECTORS[name]))


def run(using: Detector, state: Any, xs: Iterable[Observation]) -> tuple[Any, list[Found]]:
    """``step`` over many observations, in order: the last state and what each of them showed."""
    found = []
    for x in xs:
        state, one = using.step(state, x)
        found.append(one)
    return state, found
