"""A process that scores, and dies where its parent asked: ``python -m … '{"score": {…}, …}'``."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from posthoc.contract import HedgedError
from service.scoring import images, ray_engine, reading, score
from tests.service.scoring.moments import Dying, count_moments


def main(request: dict[str, Any]) -> int:
    kill = tuple(request.get("kill", ()))

    def told(phase: str, index: int) -> None:
        if (phase, index) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    reading.BLOCK_ROWS = request.get("block_rows", reading.BLOCK_ROWS)
    images.BLOCK_BYTES = request.get("block_bytes", images.BLOCK_BYTES)
    images.FRAGMENT_BYTES = request.get("fragment_bytes", images.FRAGMENT_BYTES)
    if "kill_all" in request:  # at a moment of a worker
        phase, index, note = request["kill_all"]
        scorer = ray_engine.Scorer
        ray_engine.Scorer = lambda *a: Dying(scorer(*a), (phase, index), Path(note), os.getpgrp())
    moments = count_moments(told) if request.get("watch") else None
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
