"""The ``.prom`` file of a run, read as node_exporter and promtool read it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from hedged.cli import app
from posthoc.contract import DataError
from service.metrics import METRIC_NAMES
from service.scoring import Interrupted, Progress, ScoringError, score
from service.scoring.textfile import EVERY, reporting
from tests.service.scoring.conftest import write_input

ABOUT: dict[str, Any] = {"bundle": "b", "input": "i", "output": "o"}


def read(path: Path) -> dict[str, float]:
    """Samples by name and the labels beside ``batch``, which is the file's name in all of them."""
    text = path.read_text()
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("batch") == path.stem
            assert sample.name in METRIC_NAMES
            shown = ",".join(labels[k] for k in sorted(labels) if k in ("result", "state"))
            found[sample.name.removeprefix("uq_batch_job_") + (f" {shown}" if shown else "")] = (
                sample.value
            )
    return found


def test_a_run_that_ends_well_and_one_that_reads_not_all(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", 3, 50, bad={0: (1, 2)})
    path = tmp_path / "churn.prom"
    before = time.time()
    with reporting(path, **ABOUT) as file:
        running = read(path)
        summary = score(bundle, source, tmp_path / "out", progress=file.tell)
        file.done(summary)
    assert running == {"info": 1, "running": 1}
    found = read(path)
    assert before <= found.pop("last_success_timestamp_seconds") <= time.time()
    assert found.pop("duration_seconds") == summary.seconds
    assert found.pop("rows_per_second") == summary.rows_per_s
    assert found == {
        **{"info": 1, "running": 0, "success": 1, "failed_files": 0, "input_rows": 153},
        **{"rows good": 151, "rows bad": 2, "fragments done": 3, "fragments left": 0},
    }
    assert f'run="{summary.run}"' in path.read_text() and 'output="o"' in path.read_text()
    (source / "half=0" / "part-00.parquet").write_bytes(b"PAR1 no more")
    with reporting(path, **ABOUT) as file:
        file.done(score(bundle, source, tmp_path / "again", progress=file.tell))
    now = read(path)
    assert (now["success"], now["failed_files"], now["fragments done"]) == (0, 1, 2)
    assert now["last_success_timestamp_seconds"] < time.time()  # that of the run before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("churn.prom.")]


def test_a_run_that_fails_keeps_the_last_success(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", 4, 50)
    path = tmp_path / "job.prom"
    with reporting(path, **ABOUT) as file:
        file.done(score(bundle, source, tmp_path / "out"))
    well = read(path)
    with pytest.raises(DataError), reporting(path, **ABOUT):
        during = read(path)
        score(bundle, tmp_path / "nothing", tmp_path / "other")
    # While a run goes on, its success is that of the one before: an alert on 0 must not fire.
    assert (during["success"], during["running"]) == (1, 1)
    failed = read(path)
    assert (failed["success"], failed["running"]) == (0, 0)
    assert failed["last_success_timestamp_seconds"] == well["last_success_timestamp_seconds"]

    def stop(progress: Progress) -> None:
        file.tell(progress)
        if progress.fragments_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted), reporting(path, **ABOUT) as file:
        score(bundle, source, tmp_path / "stopped", progress=stop)
    stopped = read(path)
    assert (stopped["success"], stopped["fragments done"]) == (0, stopped["fragments left"])
    assert stopped["rows good"] >= 100


def test_it_is_written_every_few_seconds(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / "job.prom"
    with reporting(path, **ABOUT, clock=lambda: now[0]) as file:
        file.tell(Progress(1, 9, 100, 1000))  # of an earlier process
        for seconds in (EVERY - 1, EVERY, EVERY + 1, 2 * EVERY):
            now[0] = seconds
            file.tell(Progress(2, 9, 100 + int(10 * seconds), 1000, bad=5, failed=1))
            seen = read(path)
            if seconds < EVERY:
                assert seen == {"info": 1, "running": 1}
            elif seconds < 2 * EVERY:
                assert seen["duration_seconds"] == EVERY
        assert seen["duration_seconds"] == 2 * EVERY
        assert seen["rows_per_second"] == pytest.approx(10)
        assert (seen["rows good"], seen["rows bad"], seen["failed_files"]) == (195, 5, 1)


def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"end in \.prom"), reporting(tmp_path / "a.txt", **ABOUT):
        raise AssertionError
    gone = tmp_path / "gone" / "job.prom"
    with pytest.raises(ScoringError, match="cannot write"), reporting(gone, **ABOUT):
        raise AssertionError
    gone.parent.mkdir()
    with caplog.at_level(logging.WARNING), reporting(gone, **ABOUT):
        gone.unlink()
        gone.parent.rmdir()  # a run of hours does not end for that
    assert "cannot write" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/in?access_key=secret#secret",
        "s3://key:sec/ret/secret@bucket/in",  # a slash that should have been %2F
    ],
)
def test_no_secret_of_a_url_is_shown(tmp_path: Path, url: str) -> None:
    about = {**ABOUT, "input": url}
    with reporting(tmp_path / "job.prom", **about):
        pass
    text = (tmp_path / "job.prom").read_text()
    assert 'input="s3://bucket/in"' in text and "secret" not in text and "sec/" not in text


def test_a_file_that_is_no_metrics_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "job.prom"
    path.write_text("{{{ not metrics")
    with reporting(path, **ABOUT):
        pass
    assert read(path)["success"] == 0


def test_the_command_takes_it(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", 2, 30)
    path = tmp_path / "nightly.prom"
    asked = ["score", str(bundle), str(source), str(tmp_path / "out"), "--textfile", str(path)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert read(path)["rows good"] == 61
    assert f'input="{source}"' in path.read_text()
    failed = CliRunner().invoke(app, [*asked, "--alpha", "0.3"])
    assert failed.exit_code == 1
    assert read(path)["success"] == 0
