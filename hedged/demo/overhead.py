"""What the error bars cost: the frozen graph and the fused one, run in turn on the same rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

from posthoc.contract import Array
from posthoc.runtime import open_session


def throughput_ratio(
    bare: bytes,
    fused: bytes,
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    runs: int = 15,
    threads: int = 2,
    inner: int = 1,
) -> dict[str, float]:
    """``ratio`` of throughput, fused with ``outputs`` over bare with its own (1 is no cost), and
    the median seconds of each. Interleaved, after a warm-up; each time covers ``inner`` runs."""
    sessions = [
        (open_session(bare, threads=threads), None),
        (open_session(fused, threads=threads), list(outputs)),
    ]
    times: list[list[float]] = [[], []]
    for run in range(runs + 2):
        for i, (session, names) in enumerate(sessions):
            started = time.perf_counter()
            for _ in range(inner):
                session.run(names, dict(inputs))
            if run >= 2:
                times[i].append((time.perf_counter() - started) / inner)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "bare_s": median(times[0]),
        "fused_s": median(times[1]),
    }
