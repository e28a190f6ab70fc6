"""Killed at any moment and started again, a run ends with the bytes of one that was not killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.scoring import reading, score
from tests.service.scoring.conftest import outputs, tree, write_input

FILES = 12
BLOCK_ROWS = 128
SETTINGS: dict[str, Any] = {"batch_size": 64, "threads": 1, "passthrough": ["day"]}
ROOT = Path(__file__).parents[3]


def child(**request: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.service.scoring.child", json.dumps(request)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "input"
    return write_input(folder, FILES, 300, bad={2: (5, 70), 7: (0,), 9: (301,)})


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, source: Path
) -> tuple[Path, dict[str, Any]]:
    """The output of a run that nobody kills, and how many moments each phase of it has."""
    output = tmp_path_factory.mktemp("kill") / "unbroken"
    done = child(score=arguments(bundle, source, output), block_rows=BLOCK_ROWS, watch=True)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def arguments(bundle: Path, source: Path, output: Path) -> dict[str, Any]:
    return {"bundle": str(bundle), "input": str(source), "output": str(output), **SETTINGS}


def moment(seed: int, counts: dict[str, int]) -> tuple[str, int]:
    """A seeded moment: one in ten at the manifest, the others while fragments are worked on."""
    rng = np.random.default_rng(seed)
    if seed % 10 == 9:
        return "manifest", int(rng.integers(1, counts["manifest"] + 1))
    phase = ("reading", "scoring", "writing", "renaming")[seed % 4]
    count = counts[phase]
    return phase, int(rng.integers(count // 8, count - count // 8))


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.long)])
def test_a_killed_run_resumes_to_the_same_bytes(
    kills: int,
    bundle: Path,
    source: Path,
    unbroken: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, counts = tree(unbroken[0]), unbroken[1]["moments"]
    monkeypatch.setattr(reading, "BLOCK_ROWS", BLOCK_ROWS)
    halfway, phases = 0, set()
    for seed in range(kills):
        output = tmp_path / f"out-{seed}"
        kill = moment(seed, counts)
        phases.add(kill[0])
        killed = child(
            score=arguments(bundle, source, output),
            block_rows=BLOCK_ROWS,
            watch=True,
            kill=kill,
        )
        assert killed.returncode == -signal.SIGKILL, (kill, killed.stderr)
        committed = outputs(output) if output.exists() else []
        for name in committed:
            assert (output / name).read_bytes() == reference[name], (kill, name)
        halfway += 0 < len(committed) < FILES
        summary = score(**arguments(bundle, source, output))
        assert summary.resumed == len(committed), kill
        assert tree(output) == reference, kill
    assert phases == {"reading", "scoring", "writing", "renaming", "manifest"}
    assert halfway >= 0.8 * kills


def test_the_unbroken_run_covers_every_phase(unbroken: tuple[Path, dict[str, Any]]) -> None:
    output, told = unbroken
    assert len(outputs(output)) == FILES
    assert {n for n in tree(output) if n.startswith("_")} == {
        "_SUCCESS",
        "_drift.json",
        "_run.json",
        "_summary.json",
        "_errors/half=0/part-02.parquet",
        "_errors/half=1/part-07.parquet",
        "_errors/half=1/part-09.parquet",
    }
    assert all(told["moments"][p] >= 2 * FILES for p in ("reading", "scoring", "writing"))


def test_scoring_imports_nothing_that_fits(unbroken: tuple[Path, dict[str, Any]]) -> None:
    assert not {"torch", "onnx", "sklearn", "plotly"} & set(unbroken[1]["modules"])


def test_a_full_disk_leaves_nothing_that_looks_done(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 8, 100)
    write_input(tmp_path / "big", 1, 20_000)
    (tmp_path / "big" / "half=0" / "part-00.parquet").rename(source / "half=1" / "huge.parquet")
    whole = tmp_path / "whole"
    score(**arguments(bundle, source, whole))
    sizes = {n: len(b) for n, b in tree(whole).items()}
    huge = sizes.pop("half=1/huge.parquet")
    output = tmp_path / "out"

    none = child(score=arguments(bundle, source, output), file_bytes=100)
    assert none.returncode == 1
    assert "ScoringError: cannot write" in none.stderr and "_run.json" in none.stderr
    assert tree(output) == {}

    limit = (max(sizes.values()) + huge) // 2
    some = child(score=arguments(bundle, source, output), file_bytes=limit)
    assert some.returncode == 1
    assert "ScoringError: cannot write" in some.stderr
    assert "huge.parquet: File too large" in some.stderr
    left = tree(output)
    assert "_SUCCESS" not in left
    assert not [n for n in left if ".part-" in n]
    assert outputs(output) == [n for n in outputs(whole) if n < "half=1/huge.parquet"]

    score(**arguments(bundle, source, output))
    assert tree(output) == tree(whole)
