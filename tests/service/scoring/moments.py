"""Moments of a run, and workers that die at one of them or in the middle of a fragment.

Moments are counted, not timed: a profile function counts the calls (and returns) that make up a
phase, in every thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from service.scoring import task
from service.scoring.fragments import Fragment
from service.scoring.ray_engine import Scorer

# Phase -> the Python functions (file, name) and builtins whose calls and returns are its moments.
FUNCTIONS = {
    ("scoring/reading.py", "_pieces"): "reading",
    ("posthoc/data.py", "to_rows"): "reading",
    ("calibration/predictor.py", "run"): "scoring",
    ("scoring/task.py", "_write"): "writing",
    ("scoring/task.py", "commit"): "writing",
    ("scoring/output.py", "write_file"): "manifest",
}
BUILTINS = {os.replace: "renaming", os.fsync: "renaming"}
HELD_S = 120  # and then nobody came


def count_moments(told: Callable[[str, int], None]) -> Counter[str]:
    """From now on, in this thread and those to come; ``told`` hears of each, and which it is."""
    moments: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "return"):
            code = frame.f_code
            found = FUNCTIONS.get(("/".join(code.co_filename.split("/")[-2:]), code.co_name))
        else:
            found = BUILTINS.get(arg) if event in ("c_call", "c_return") else None
        if found is not None:
            moments[found] += 1
            told(found, moments[found])

    threading.setprofile(watch)
    sys.setprofile(watch)
    return moments


@dataclass
class Watched:
    """A scorer that writes down its moments so far, and what its process has imported."""

    scorer: Scorer
    note: Path
    moments: Counter[str] | None = None

    def __call__(self, handed: tuple[Fragment, int]) -> Any:
        if self.moments is None:
            self.moments = count_moments(lambda *_: None)
        result = self.scorer(handed)
        self.note.write_text(json.dumps({"moments": self.moments, "modules": sorted(sys.modules)}))
        return result


@dataclass
class Dying:
    """A scorer of which one process dies at the moment ``kill``, and ``group`` with it.

    ``note`` is then there, and names the files of the output at that time.
    """

    scorer: Scorer
    kill: tuple[str, int]
    note: Path
    group: int | None = None
    moments: Counter[str] | None = field(default=None, init=False)

    def __call__(self, handed: tuple[Fragment, int]) -> Any:
        if self.moments is None:
            self.moments = count_moments(self._moment)
        return self.scorer(handed)

    def _moment(self, phase: str, index: int) -> None:
        if (phase, index) != self.kill or not _first(self.note):
            return
        self.note.write_text(json.dumps(self.scorer.plan.output.names()))
        if self.group is not None:
            os.killpg(self.group, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Deadly:
    """A scorer whose process dies whenever it is given the fragment ``name``."""

    scorer: Scorer
    name: str

    def __call__(self, handed: tuple[Fragment, int]) -> Any:
        if handed[0].name == self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.scorer(handed)


@dataclass
class Held:
    """A scorer that stays in the middle of the fragment ``name`` where it is first met, and writes
    down on which node that is."""

    scorer: Scorer
    name: str
    note: Path

    def __call__(self, handed: tuple[Fragment, int]) -> Any:
        if handed[0].name == self.name and not self.note.exists():
            task.answer = self._stay
        return self.scorer(handed)

    def _stay(self, *_: Any) -> Any:
        import ray

        assert _first(self.note)
        self.note.write_text(ray.get_runtime_context().get_node_id())
        until = time.monotonic() + HELD_S
        while time.monotonic() < until:
            time.sleep(0.05)
        raise TimeoutError("the node was not removed")


def _first(note: Path) -> bool:
    try:
        note.open("x").close()
    except FileExistsError:
        return False
    return True
