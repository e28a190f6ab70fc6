"""How long a model takes, as measured while it serves."""

from __future__ import annotations

from collections import deque

QUICK_S = 250e-6
"""A run of so many seconds costs less than handing it to a thread and its answer back."""
_RUNS = 9


class Pace:
    """Seconds of a model's latest runs, by the values in all of its inputs together.

    Their number counts in powers of two. Rows would not do: an axis may be free.
    """

    def __init__(self) -> None:
        self._runs: dict[int, deque[float]] = {}
        self._typical: dict[int, float] = {}

    def note(self, values: int, seconds: float) -> None:
        """A run on so many values took so long."""
        size = values.bit_length()
        runs = self._runs.setdefault(size, deque(maxlen=_RUNS))
        runs.append(seconds)
        if len(runs) > _RUNS // 2:
            self._typical[size] = sorted(runs)[len(runs) // 2]

    def quick(self, values: int) -> bool:
        """Whether runs on so many values are known to take at most QUICK_S."""
        typical = self._typical.get(values.bit_length())
        return typical is not None and typical <= QUICK_S
