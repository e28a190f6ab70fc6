"""``python -m bench http``: our server beside others, on one graph and one machine in one run.

The others: a bare ONNX Runtime session, a bare Starlette application, BentoML's own batchable API
and a custom runtime of MLServer.

The graph is the fused one of a small tabular model (MAGIC telescope, ten columns), so that servers
and not the model are measured, and of magika (which is reported and held to nothing). One process
and one thread of the model each; ours with ledger, metrics and BentoML around it, as
`hedged serve` starts it. Ours and the Starlette floor answer six fields, the two peers the
probabilities alone. wrk asks from the same machine; all servers stand all the time and are asked
in turn. MLServer is asked with and without its batching, and the better figure counts. For the tail
each server stands alone: others that wait for requests wake now and then, which is what a slowest
hundredth is made of.

``overhead_us_c1`` is the median of one call of our application, in process, less the median of the
bare session's run of the same row. ``ratio_p50_after_burst`` is our median on one connection right
after a burst over that before it, ``p99_over_p50_c1`` over at least 20,000 requests, each timed by
itself; ``p99_over_p50_c1_corrected`` is wrk's own of the same requests, see `bench.wrk`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.http_sides import Question, Side, magika, sides, tabular
from bench.peers import Worker
from bench.wrk import Load

CONNECTIONS = (1, 16, 64)
TAILS = ("ours", "starlette", "mlserver")  # BentoML answers too few on one connection


def run(quick: bool) -> dict[str, Any]:
    """Latency and throughput of every side on both models, of the small one alone if quick."""
    with tempfile.TemporaryDirectory(prefix="hedged-bench-") as folder:
        at = Path(folder)
        found = _measured(tabular(at), at / "small", quick)
        reported = None
        if not quick:
            reported = _measured(magika(at), at / "large", quick, rounds=1, tail=1000)
    most = max(CONNECTIONS)
    mlserver = max(
        found["sides"][name][str(most)]["per_second"] for name in ("mlserver", "mlserver batching")
    )
    ours = found["sides"]["ours"][str(most)]["per_second"]
    return {
        "overhead_us_c1": found["in_process"]["overhead_us"],
        "ratio_throughput_c64_vs_bentoml": ours
        / found["sides"]["bentoml"][str(most)]["per_second"],
        "ratio_throughput_c64_vs_mlserver": ours / mlserver,
        "ratio_p50_after_burst": found["burst"]["ours"]["ratio"],
        "p99_over_p50_c1": found["tail"]["ours"]["ratio"],
        "p99_over_p50_c1_corrected": found["tail"]["ours"]["ratio_corrected"],
        "tabular": found,
        "magika": reported,
    }


def _measured(
    bundle: Path, folder: Path, quick: bool, rounds: int = 3, tail: int = 20_000
) -> dict[str, Any]:
    """Every figure of one bundle."""
    seconds, rounds = (1.0, 1) if quick else (4.0, rounds)
    folder.mkdir()
    question = Question.of(bundle)
    metrics = folder / "metrics"
    metrics.mkdir()
    environ = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    with Worker.here("bench.http_ours", environ=environ) as inside:
        in_process = inside.call(
            "overhead",
            bundle=str(bundle),
            data_dir=str(folder / "in-process"),
            path=question.path,
            body=question.infer.decode(),
            calls=500 if quick else 5000,
        )
    loads: dict[str, dict[int, list[Load]]] = {}
    with contextlib.ExitStack() as stack:
        standing = [stack.enter_context(side) for side in sides(question, folder).values()]
        for side in standing:
            side.load(4, 1.0)  # warm
        for _ in range(rounds):
            for connections in CONNECTIONS:
                for side in standing:
                    by = loads.setdefault(side.name, {}).setdefault(connections, [])
                    by.append(side.load(connections, seconds))
        burst = {s.name: _burst(s, quick) for s in standing if s.name in ("ours", "bentoml")}
    alone = folder / "alone"
    alone.mkdir()
    end = {}
    for name, start in sides(question, alone).items():
        if name in TAILS:
            with start as side:
                end[name] = _tail(side, 1000 if quick else tail)
    return {
        "in_process": in_process,
        "sides": {
            name: {str(c): _summary(runs) for c, runs in by.items()} for name, by in loads.items()
        },
        "burst": burst,
        "tail": end,
    }


def _summary(runs: Sequence[Load]) -> dict[str, float]:
    rates = [r.per_second for r in runs]
    return {
        "per_second": median(rates),
        "low": min(rates),
        "high": max(rates),
        "p50_s": median(r.p50 for r in runs),
        "p99_s": median(r.p99 for r in runs),
        "errors": sum(r.errors for r in runs),
        "rounds": len(runs),
    }


def _burst(side: Side, quick: bool) -> dict[str, float]:
    """The median on one connection before a burst of 64 and right after it."""
    seconds, burst = (1.0, 2.0) if quick else (3.0, 6.0)
    before = side.load(1, seconds)
    side.load(64, burst)
    after = side.load(1, seconds)
    return {"before_s": before.p50, "after_s": after.p50, "ratio": after.p50 / before.p50}


def _tail(side: Side, requests: int) -> dict[str, float]:
    """Median and p99 on one connection over at least so many requests."""
    side.load(4, 1.0)  # warm
    rate = side.load(1, 1.0).per_second
    found, took = side.latencies(1.2 * requests / rate + 1)
    p50, p99 = (float(q) for q in np.quantile(took, [0.5, 0.99]))
    return {
        "requests": len(took),
        "p50_s": p50,
        "p99_s": p99,
        "ratio": p99 / p50,
        "ratio_corrected": found.p99 / found.p50,
    }
