"""The figures that README and docs quote, each a sentence made of what a benchmark found and kept.

`rows` reads ``bench/results``; the part ``figures`` of docs/measured.md is made of it, and a test
compares the two. A figure of a benchmark whose file is not there is not quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.results import kept

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the page: the benchmark, what is measured, and how its value reads."""

    bench: str
    what: str
    value: Callable[[Found], str]


def rows() -> list[tuple[str, str, str]]:
    """(what, value, command) of every figure whose benchmark was kept, in order."""
    found = {f.bench: kept(f.bench) for f in FIGURES}
    made = []
    for figure in FIGURES:
        if (it := found[figure.bench]) is not None:
            quick = " --quick" if it.get("quick") else ""
            command = f"`python -m bench {figure.bench}{quick} --json`"
            made.append((figure.what, figure.value(it), command))
    return made


def _shift(found: Found, *kinds: str) -> str:
    """Mean (and least) coverage over sets and kinds of shift at 90 %, by form of the weights."""
    table = [r for r in found["shift"]["table"] if r["alpha"] == 0.1 and r["shift"] in kinds]
    parts = []
    for form in ("unweighted", "estimated", "oracle"):
        by_set: dict[str, list[float]] = {}
        for r in table:
            if form in r and r[form]["coverage"] is not None:
                by_set.setdefault(r["set"], []).append(r[form]["coverage"])
        means = [sum(v) / len(v) for v in by_set.values()]
        parts.append(f"{sum(means) / len(means):.3f} ({min(means):.3f})")
    return ", ".join(parts)


def _few(found: Found) -> str:
    table = [r for r in found["peers"]["table"] if r["alpha"] == 0.1 and r["n"] == 20]
    pool = table[0]["pool"]
    of = {(r["score"], r["library"]): r["coverage"] for r in table if r["pool"] == pool}
    order = ("hedged", "torch-uncertainty", "mapie", "torchcp")
    scores = dict.fromkeys(r["score"] for r in table)
    parts = [
        ", ".join(f"{of[s, name]:.3f}" if (s, name) in of else "none" for name in order)
        for s in scores
    ]
    return "; ".join(f"{s}: {p}" for s, p in zip(scores, parts, strict=True))


def _http(found: Found, model: str) -> str:
    sides = found[model]["sides"]
    per = {name: side["64"]["per_second"] for name, side in sides.items()}
    mlserver = max(per["mlserver"], per["mlserver batching"])
    order = (per["ours"], per["bentoml"], mlserver, per["starlette"])
    return ", ".join(f"{n:,.0f}" for n in order)


FIGURES = (
    Figure(
        "coverage",
        "coverage of every set and interval, 17 sets of data × 3 levels × 20 splits: cells inside "
        "the 99 % band of their sizes; set, method and level with fewer than 18 of 20 splits "
        "inside",
        lambda f: (
            f"{f['cells_inside_band']:.3f} of {f['cells']:,}; "
            f"{len(f['below_18']) or 'none'} of {f['levels']}"
        ),
    ),
    Figure(
        "coverage",
        "simulated shift at 90 %, mean over sets (worst set): unweighted, estimated weights, true "
        "weights. Harder rows",
        lambda f: _shift(f, "doubt"),
    ),
    Figure(
        "coverage",
        "the same, classes or targets in other shares",
        lambda f: _shift(f, "target"),
    ),
    Figure(
        "coverage",
        "sets with 20 calibration rows, 500 splits, where 0.905 is right: hedged, "
        "torch-uncertainty 0.13, MAPIE 1.6, TorchCP 1.2.1",
        _few,
    ),
    Figure(
        "http",
        "one call of our application less the bare session's run, ledger and metrics on, tabular "
        "model of ten columns (150 µs is the aim)",
        lambda f: f"{f['overhead_us_c1']:.0f} µs",
    ),
    Figure(
        "http",
        "answers a second, 64 connections, one worker each, same model: hedged, BentoML's "
        "batchable API, MLServer's custom runtime (the better of with and without batching; twice "
        "it is the aim), Starlette and nothing else",
        lambda f: (
            f"{_http(f, 'tabular')}; magika, where the model is the limit: {_http(f, 'magika')}"
        ),
    ),
    Figure(
        "http",
        "median on one connection after a burst over before it; p99 over median (3 is the aim)",
        lambda f: (
            f"{f['ratio_p50_after_burst']:.2f}; {f['p99_over_p50_c1']:.1f} over "
            f"{f['tabular']['tail']['requests']:,} requests"
        ),
    ),
    Figure(
        "batch",
        "`hedged score` over a loop written by hand, same Parquet file, one thread, every field "
        "written: small tabular model, MNISTNet",
        lambda f: (
            f"{f['ratio_vs_ort_loop']:.2f} times as fast on {f['loop']['rows']:,} rows, "
            f"{f['ratio_vs_ort_loop_image']:.2f} on {f['loop_image']['rows']:,} images"
        ),
    ),
    Figure(
        "batch",
        "the same by rows in the data set: seconds a million rows, without the start; most memory "
        "over that of 100,000 rows",
        lambda f: (
            ", ".join(f"{s:.1f} ({int(n):,})" for n, s in f["seconds_per_million"].items())
            + f"; start {f['start_s']:.1f} s; {f['memory_ratio']:.2f}"
        ),
    ),
    Figure(
        "batch",
        "two Ray workers over one on magika, one thread each, starts taken off; with them; two "
        "bare processes over one on the same machine",
        lambda f: (
            f"{f['ratio_two_workers']:.2f}; {f['workers']['with_start']:.2f}; "
            f"{f['workers']['ratio_two_bare']:.2f}"
        ),
    ),
    Figure(
        "shift_kinds",
        "kind of shift told of windows of 1,000 rows: any kind of unshifted ones; all "
        "rows told of new classes of at most two fifths",
        lambda f: f"{f['false_kind'][0]:.3f}; {f['all_rows_excludes'][0]:.3f}",
    ),
)
