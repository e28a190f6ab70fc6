"""Two sides timed in turn: medians, their spread, and the ratio of the peer to ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one side, one number a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return median(self.seconds)

    def record(self) -> dict[str, float]:
        """Median, least and most, and the number of rounds, for the report."""
        return {
            "median_s": self.median,
            "low_s": min(self.seconds),
            "high_s": max(self.seconds),
            "rounds": len(self.seconds),
        }


def per_call(work: Callable[[], object], least: float = 0.05) -> float:
    """Seconds of one call: the mean over as many calls as fill ``least`` seconds, at least one.

    The caller warms up.
    """
    calls, started = 0, time.perf_counter()
    while True:
        work()
        calls += 1
        elapsed = time.perf_counter() - started
        if elapsed >= least:
            return elapsed / calls


def in_turn(sides: Sequence[Callable[[], float]], rounds: int) -> tuple[Times, ...]:
    """Every side once a round, in the given order: what slows the machine down slows all of them.

    A side is a function that does its work and gives the seconds that it took.
    """
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for times, side in zip(found, sides, strict=True):
            times.append(side())
    return tuple(Times(tuple(t)) for t in found)


def ratio(peer: Times, ours: Times) -> float:
    """How many times faster ours is: the ratio of the medians."""
    return peer.median / ours.median


def compared(peer: Times, ours: Times) -> dict[str, object]:
    """Both sides, and the least and the most favourable ratio of two rounds side by side."""
    pairs = [a / b for a, b in zip(peer.seconds, ours.seconds, strict=False)]
    return {
        "peer": peer.record(),
        "ours": ours.record(),
        "ratio_low": min(pairs),
        "ratio_high": max(pairs),
    }
