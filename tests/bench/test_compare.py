"""The memory of a process and its children, and the comparison that the benchmark times."""

from __future__ import annotations

import subprocess
import sys

from bench.compare import Peak

_HOLDER = """
import subprocess, sys
held = bytearray(100_000_000)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], check=True)
else:
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_the_peak_counts_children() -> None:
    command = [sys.executable, "-c", _HOLDER, _HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"holding\n"  # both hold 100 MB now
        peak = Peak(process.pid)
        while not peak.looks:
            peak.wait()
        process.stdin.close()
        assert process.wait(60) == 0
        peak.stop()
    assert 200e6 < peak.pss < peak.rss * 1.05 < 600e6
