"""``python -m bench compare``: `hedged compare` on magika, every module and score, five re-splits.

The command runs as a user would run it, with an empty cache. ``seconds`` is its wall time,
``peak_mb`` the most that it and its processes held at once: proportional set sizes, so that pages
which processes share count once (``peak_rss_mb`` counts them in each). ``model_passes`` is how many
rows the network was run on, over the rows of the table: one pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from bench.material import magika_columns, magika_files

SPLITS, QUICK_SPLITS = 5, 2
EVERY = 0.25  # seconds between looks at the memory
QUICK = ("--methods", "laplace,gaussian", "--scores", "gen,mahalanobis,gen+mds")


def run(quick: bool) -> dict[str, Any]:
    """Time, memory and passes of one comparison, and what it found."""
    files, columns = magika_files(), magika_columns()
    assert columns.classes is not None
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names.txt"
        names.write_text("\n".join(columns.classes))
        command = [
            *(sys.executable, "-m", "hedged", "compare", str(files.model)),
            *("--data", str(files.data), "--task", "classification", "--target", "label"),
            *("--inputs", "bytes=bytes", "--classes", str(names)),
            *("--splits", str(QUICK_SPLITS if quick else SPLITS)),
            *("--cache", f"{folder}/cache", "-o", f"{folder}/out", "--json"),
            *(QUICK if quick else ()),
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        peak = Peak(process.pid)
        out, _ = process.communicate()
        seconds = time.perf_counter() - started
        peak.stop()
        if process.returncode:
            raise RuntimeError(f"hedged compare failed with {process.returncode}")
        found = json.loads(out)
    rows = pq.read_metadata(files.data).num_rows
    return {
        "seconds": seconds,
        "peak_mb": peak.pss / 1e6,
        "peak_rss_mb": peak.rss / 1e6,
        "model_passes": found["model_rows"] / rows,
        "splits": found["splits"],
        "modules": len({s["method"] for s in found["standings"]}),
        "candidates": len(found["standings"]),
        "scores": len(found["scores"]),
        "recommendation": found["recommendation"],
        "standings": found["standings"],
        "found_scores": found["scores"],
        "final": found["final"],
    }


class Peak:
    """The most memory that a process and its children hold, looked at in a thread."""

    def __init__(self, pid: int):
        self.pss = self.rss = self.looks = 0
        self._tree = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the next look, about."""
        self._done.wait(EVERY)

    def stop(self) -> None:
        """No more looks."""
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            pss = rss = 0
            try:
                for p in (self._tree, *self._tree.children(recursive=True)):
                    held = p.memory_full_info()
                    pss, rss = pss + held.pss, rss + held.rss
            except psutil.Error:
                continue  # one ended meanwhile
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)
            self.looks += 1
