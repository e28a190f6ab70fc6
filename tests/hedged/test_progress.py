"""What a terminal shows of a run while it lasts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
