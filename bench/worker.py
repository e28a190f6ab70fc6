"""One side of a benchmark as a process of its own: tasks by name, one JSON line each.

Peers need packages that must not meet ours, threads must be limited before numpy or torch is
imported, and peak memory is a property of a process; so both sides run like this, each in its own
interpreter. Arrays travel by ``.npz`` files, never pickled. This module imports nothing but the
standard library, because a peer's environment has nothing else of ours.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Task = Callable[..., Any]

_STATUS = Path("/proc/self/status")


def serve(tasks: Mapping[str, Task]) -> None:
    """Answer requests ``{"task": name, "with": {...}}`` from standard input until it ends.

    A reply is ``{"value": ...}``, or ``{"error": last line, "trace": text}`` when the task raised.
    What libraries print goes to standard error, so that it cannot be taken for a reply.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply = {"value": tasks[asked["task"]](**asked["with"])}
        except Exception as e:  # reported to the other end, which raises it there
            text = f"{type(e).__name__}: {e}".strip().splitlines()
            reply = {"error": text[0], "trace": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def peak_bytes(work: Callable[[], object]) -> int:
    """By how much the resident memory of this process rose above its start while ``work`` ran.

    Linux resets the high-water mark first; elsewhere the mark of the whole process is taken, so
    the process should have done little before.
    """
    before = _resident("VmRSS")
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    work()
    return max(_resident("VmHWM") - before, 0)


def most_bytes() -> int:
    """The most resident memory that this process had; on Linux, since `peak_bytes` began last."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
