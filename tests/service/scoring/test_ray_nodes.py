"""Runs that start their own cluster: one of several nodes, and the command's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from service.scoring import score
from tests.service.scoring.conftest import outputs, tree, write_input

ROOT = Path(__file__).parents[3]
PATIENCE_S = 200
FILES = 120


def test_a_node_lost_in_the_middle_of_a_fragment_costs_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    source = write_input(tmp_path / "input", 12, 100, bad={8: (3,)})
    score(bundle, source, tmp_path / "whole")
    name = "half=0/part-08.parquet"
    done = subprocess.run(
        [sys.executable, "-m", "tests.service.scoring.nodes", bundle, source, tmp_path / "out",
         name, tmp_path / "note"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])  # Ray's own stand before it
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("a worker was lost,")
    assert len(told["lost"]) == 1 and told["lost"][0].endswith("part-08.parquet")
    assert told["fragments"] == 12
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.fixture
def command(bundle: Path, tmp_path: Path) -> list[str]:
    source = write_input(tmp_path / "input", FILES, 50)
    return [sys.executable, "-m", "hedged", "score", str(bundle), str(source),
            str(tmp_path / "out")]  # fmt: skip


@pytest.mark.long
def test_a_command_outlives_a_worker_and_goes_on_after_a_stop(
    command: list[str], bundle: Path, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [*command, "--engine", "ray", "--workers", "2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"COLUMNS": "200"},
    ) as run:  # fmt: skip
        try:
            wait_for(run, tmp_path / "out", 2)
            kill_a_worker(run)
            wait_for(run, tmp_path / "out", 8)
            run.send_signal(signal.SIGTERM)
            out, err = run.communicate(timeout=PATIENCE_S)
        finally:
            run.kill()
    committed = outputs(tmp_path / "out")
    assert run.returncode == 75, err
    assert out == ""
    said = [line for line in err.splitlines() if line]
    assert len(said) == 2, err
    lost, stopped = said
    assert lost.startswith("a worker was lost, another does its work: ")
    assert stopped == (
        f"hedged: stopped by SIGTERM after {len(committed)} of {FILES} fragments; "
        "the same command goes on"
    )
    assert not list((tmp_path / "out").rglob(".part-*"))
    again = subprocess.run(
        [*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert again.returncode == 0 and again.stderr.strip() == ""
    assert json.loads(again.stdout)["resumed"] == len(committed)
    score(bundle, tmp_path / "input", tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def wait_for(run: subprocess.Popen[str], output: Path, fragments: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while len(list(output.glob("*/part-*.parquet"))) < fragments:
        assert run.poll() is None and time.monotonic() < until


def kill_a_worker(run: subprocess.Popen[str]) -> None:
    """One with work in hand."""
    until = time.monotonic() + PATIENCE_S
    while True:
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::_Worker.run"):
                    process.kill()
                    return
        assert time.monotonic() < until


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "workers belongs to the engine ray"),
        (["--num-gpus", "1"], "num_gpus belongs to the engine ray"),
        (["--engine", "spark"], "engine 'spark' is unknown; use local or ray"),
        (["--engine", "ray", "--threads", "0"], "give a number of threads"),
    ],
)
def test_options_that_do_not_go_together(
    command: list[str], tmp_path: Path, options: list[str], said: str
) -> None:
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "out").exists()
