"""A process that scores, and dies where its parent asked: ``python -m … '{"score": {…}, …}'``.

Moments are counted, not timed: a profile function counts the calls (and returns) that make up a
phase, in every thread, and sends SIGKILL at the chosen one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from collections import Counter
from types import FrameType
from typing import Any

from posthoc.contract import HedgedError
from service.scoring import images, reading, score

# Phase -> the Python functions (file, name) and builtins whose calls and returns are its moments.
FUNCTIONS = {
    ("scoring/reading.py", "_record_batches"): "reading",
    ("posthoc/data.py", "to_rows"): "reading",
    ("calibration/predictor.py", "run"): "scoring",
    ("scoring/task.py", "_write"): "writing",
    ("scoring/task.py", "commit"): "writing",
    ("scoring/output.py", "write_file"): "manifest",
}
BUILTINS = {os.replace: "renaming", os.fsync: "renaming"}


def main(request: dict[str, Any]) -> int:
    moments: Counter[str] = Counter()
    phase, index = request.get("kill", (None, None))

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "return"):
            code = frame.f_code
            found = FUNCTIONS.get(("/".join(code.co_filename.split("/")[-2:]), code.co_name))
        else:
            found = BUILTINS.get(arg) if event in ("c_call", "c_return") else None
        if found is not None:
            moments[found] += 1
            if found == phase and moments[found] == index:
                os.kill(os.getpid(), signal.SIGKILL)

    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    reading.BLOCK_ROWS = request.get("block_rows", reading.BLOCK_ROWS)
    images.BLOCK_BYTES = request.get("block_bytes", images.BLOCK_BYTES)
    images.FRAGMENT_BYTES = request.get("fragment_bytes", images.FRAGMENT_BYTES)
    if request.get("watch"):
        threading.setprofile(watch)
        sys.setprofile(watch)
    try:
        score(**request["score"])
    except HedgedError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return int(getattr(e, "exit_code", 1))
    finally:
        sys.setprofile(None)
    print(json.dumps({"moments": moments, "modules": sorted(sys.modules)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
