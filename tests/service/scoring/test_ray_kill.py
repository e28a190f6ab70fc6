"""A Ray worker, or all of a run, killed at any moment: the bytes are those of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from service.scoring import ray_engine, score
from service.scoring.ray_engine import Scorer
from tests.service.scoring.conftest import outputs, tree, write_input
from tests.service.scoring.moments import Dying, Watched

FILES = 12
SETTINGS: dict[str, Any] = {"batch_size": 64, "passthrough": ["day"]}
ROOT = Path(__file__).parents[3]
PATIENCE_S = 60

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "input"
    return write_input(folder, FILES, 300, bad={2: (5, 70), 7: (0,), 9: (301,)})


@pytest.fixture(scope="module")
def reference(bundle: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process writes."""
    output = tmp_path_factory.mktemp("kill") / "local"
    score(bundle, source, output, **SETTINGS)
    return tree(output)


@pytest.fixture(scope="module")
def counts(
    cluster: None, bundle: Path, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """How many moments each phase has, where one worker does everything."""
    folder = tmp_path_factory.mktemp("kill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_engine, "Scorer", lambda *a: Watched(Scorer(*a), folder / "note"))
        score(bundle, source, folder / "out", engine="ray", workers=1, **SETTINGS)
    return json.loads((folder / "note").read_text())["moments"]


def moment(seed: int, counts: dict[str, int]) -> tuple[str, int]:
    """A seeded moment of a worker. One of two has at least half of all the moments, and what is
    in hand in that half is not the last."""
    phase = ("reading", "scoring", "writing", "renaming")[seed % 4]
    return phase, int(np.random.default_rng(seed).integers(counts[phase] // 8, counts[phase] // 2))


def kill_everything(request: dict[str, Any]) -> None:
    """A run in a process group of its own, which ends whole when its driver or a worker says so."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.service.scoring.child", json.dumps(request)],
        cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=300)
        assert child.returncode == -signal.SIGKILL, (out, err)
        until = time.monotonic() + PATIENCE_S
        while left := [p for p in psutil.process_iter() if session_of(p) == child.pid]:
            assert time.monotonic() < until, left
    finally:
        for process in psutil.process_iter():
            if session_of(process) == child.pid:
                process.kill()


def session_of(process: psutil.Process) -> int:
    try:
        return -1 if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (ProcessLookupError, psutil.Error):
        return -1


@pytest.mark.parametrize(
    "seeds", [(0, 3), pytest.param(tuple(range(20)), marks=pytest.mark.long)], ids=len
)
def test_whatever_is_killed_the_bytes_are_those_of_an_unbroken_run(
    seeds: tuple[int, ...],
    bundle: Path,
    source: Path,
    reference: dict[str, bytes],
    counts: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halfway, phases = 0, set()
    for seed in seeds:
        output, note = tmp_path / f"out-{seed}", tmp_path / f"note-{seed}"
        run = {"bundle": str(bundle), "input": str(source), "output": str(output), **SETTINGS}
        phase, index = kill = moment(seed, counts)
        if seed % 5 < 3:  # one worker; the others go on
            with monkeypatch.context() as patch:
                dying = lambda *a, kill=kill, note=note: Dying(Scorer(*a), kill, note)  # noqa: E731
                patch.setattr(ray_engine, "Scorer", dying)
                summary = score(**run, engine="ray", workers=2)
            assert summary.resumed == 0
            at_death = [n for n in json.loads(note.read_text()) if n in outputs(output)]
        else:  # all of the run, by a worker or at the manifest
            request = {"score": {**run, "engine": "ray", "workers": 2}}
            if seed % 10 == 9:
                phase, index = "manifest", int(np.random.default_rng(seed).integers(1, 7))
                kill_everything(request | {"watch": True, "kill": [phase, index]})
            else:
                kill_everything(request | {"kill_all": [phase, index, str(note)]})
            at_death = outputs(output) if output.exists() else []
            for name in at_death:
                assert (output / name).read_bytes() == reference[name], (seed, name)
            engine = {"engine": "ray", "workers": 2} if seed % 2 else {}
            assert score(**run, **engine).resumed == len(at_death), seed
        assert tree(output) == reference, seed
        phases.add(phase)
        halfway += 0 < len(at_death) < FILES
    assert halfway >= 0.8 * len(seeds)
    assert len(phases) == min(len(seeds), 5)
