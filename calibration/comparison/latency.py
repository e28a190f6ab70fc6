"""What a head costs behind its model: milliseconds a row of the fused graph, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from calibration.compile import behind
from calibration.head import Head
from calibration.material import Material
from posthoc.contract import Array
from posthoc.frozen import expose
from posthoc.runtime import open_session

ROWS, REPEATS = 64, 5
LONGEST = 0.1  # seconds of one run; fewer rows are taken where they would take longer


def milliseconds(
    material: Material,
    heads: Mapping[str, Head],
    inputs: Mapping[str, Array],
    done: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, dict[str, float]]:
    """(the frozen graph alone, each head's fused graph) per row: the median of interleaved runs on
    the same rows of ``inputs``, at most ROWS."""
    frozen = material.frozen
    bare = open_session(expose(frozen), threads=1)
    feed = {k: v[:ROWS] for k, v in inputs.items()}
    once = _seconds(bare, {k: v[:1] for k, v in feed.items()})
    n = max(1, min(len(next(iter(feed.values()))), int(LONGEST / max(once, 1e-9))))
    feed = {k: v[:n] for k, v in feed.items()}
    alone: list[float] = []
    found: dict[str, float] = {}
    for i, (name, head) in enumerate(
        heads.items(), 1
    ):  # one at a time: a session may hold hundreds of megabytes
        fused = open_session(behind(head, frozen, material.link).model, threads=1)
        _seconds(fused, feed)  # the first run warms up
        spent = []
        for _ in range(REPEATS):
            alone.append(_seconds(bare, feed))
            spent.append(_seconds(fused, feed))
        found[name] = 1000 * statistics.median(spent) / n
        done(i, len(heads))
    return 1000 * statistics.median(alone) / n, found


def _seconds(session: Any, feed: Mapping[str, Array]) -> float:
    started = time.perf_counter()
    session.run(None, dict(feed))
    return time.perf_counter() - started
