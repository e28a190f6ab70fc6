"""What a head costs behind its model: milliseconds a row of the fused graph, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from calibration.compile import behind
from calibration.head import Head
from calibration.material import Material
from posthoc.contract import Array
from posthoc.frozen import expose
from posthoc.runtime import open_session

ROWS, REPEATS = 64, 7
LONGEST = 0.5  # seconds of one run; fewer rows are taken where they would take longer


def milliseconds(
    material: Material, heads: Mapping[str, Head], inputs: Mapping[str, Array]
) -> tuple[float, dict[str, float]]:
    """(the frozen graph alone, each head's fused graph) per row: the median of interleaved runs on
    the same rows of ``inputs``, at most ROWS."""
    frozen = material.frozen
    sessions = {"": open_session(expose(frozen), threads=1)}
    for name, head in heads.items():
        sessions[name] = open_session(behind(head, frozen, material.link).model, threads=1)
    feed = {k: v[:ROWS] for k, v in inputs.items()}
    started = time.perf_counter()
    sessions[""].run(None, {k: v[:1] for k, v in feed.items()})
    once = time.perf_counter() - started
    n = max(1, min(len(next(iter(feed.values()))), int(LONGEST / max(once, 1e-9))))
    feed = {k: v[:n] for k, v in feed.items()}
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    for repeat in range(REPEATS + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            if repeat:  # the first run warms up
                spent[name].append(time.perf_counter() - started)
    found = {name: 1000 * statistics.median(v) / n for name, v in spent.items()}
    return found.pop(""), found
