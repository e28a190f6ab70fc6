"""What a terminal, and what a log, shows of a run while it lasts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hedged.commands import console
from tests.factory import tiny_bundle
from tests.service.scoring.conftest import write_input

ROOT = Path(__file__).parents[2]


def test_a_terminal_shows_rows_a_second_and_the_time_left(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", "classification")
    source = write_input(tmp_path / "input", 20, 50)
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "hedged", "score", bundle, source, tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120", "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as run:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # Linux: nobody holds the other end any more
            pass
        os.close(ours)
        assert run.wait(120) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())  # without colours and the cursor
    assert re.search(r" 1190/1190 [\d,]+ rows/s \d:\d\d:\d\d", text), text


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    report = console._lines("rows", lambda: now)
    for second in range(91):
        now = 100.0 + second
        report("rows", 1_000 + 200 * second, 37_000)
    # 1,000 were done before it began, so they count in no rate.
    assert capsys.readouterr().err.splitlines() == [
        "rows: 7,000 of 37,000, 200 rows/s, 0:02:30 left",
        "rows: 13,000 of 37,000, 200 rows/s, 0:02:00 left",
        "rows: 19,000 of 37,000, 200 rows/s, 0:01:30 left",
    ]


def test_a_log_gets_nothing_of_what_is_quick_and_no_time_left_of_what_stands_still(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    report = console._lines(None, lambda: now)
    report("model", 0, 10)
    now = 29.9
    report("model", 5, 10)
    assert capsys.readouterr().err == ""
    report("splits", 0, 4)
    now = 60.0
    report("splits", 0, 4)
    assert capsys.readouterr().err == "splits: 0 of 4\n"


def test_a_run_without_a_terminal_leaves_no_codes_of_one(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", "classification")
    source = write_input(tmp_path / "input", 20, 50)
    run = subprocess.run(
        [sys.executable, "-m", "hedged", "score", bundle, source, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, b"")
