"""What is quoted of servers, jobs, monitors and folds."""

from __future__ import annotations

from bench.figure import Figure, Found


def _http(found: Found, model: str) -> str:
    sides = found[model]["sides"]
    per = {name: side["64"]["per_second"] for name, side in sides.items()}
    mlserver = max(per["mlserver"], per["mlserver batching"])
    order = (per["ours"], per["bentoml"], mlserver, per["starlette"])
    return ", ".join(f"{n:,.0f}" for n in order)


_MONITORS = (
    ("martingale", "martingale"),
    ("risk_monitor", "risk_monitor"),
    ("martingale", "fixed_reference"),
)


def _alarms(found: Found, monitor: str, column: str) -> str:
    """Share of streams that ever alarmed, at 5 % and at 1 %."""
    shares = [r[column] for r in found["false_alarms"][monitor] if column in r]
    return ", ".join(f"{max(s[a] for s in shares):.3f}" for a in ("0.05", "0.01"))


def _tails(found: Found, key: str) -> str:
    """p99 over median on one connection: ours, Starlette, MLServer."""
    tails = found["tabular"]["tail"]
    return ", ".join(f"{tails[side][key]:.1f}" for side in ("ours", "starlette", "mlserver"))


def _one_by_one(found: Found) -> str:
    """One connection: the median after a burst over before it, and tails, of so many requests."""
    requests = found["tabular"]["tail"]["ours"]["requests"]
    burst = found["ratio_p50_after_burst"]
    return f"{burst:.2f}; {_tails(found, 'ratio')} over {requests:,} requests"


FIGURES = (
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
        "median on one connection after a burst over before it; p99 over median of requests one "
        "after the other (3 is the aim): ours, Starlette and nothing else, MLServer; the same as "
        "wrk tells it, which adds the requests that a wait held back",
        lambda f: f"{_one_by_one(f)}; {_tails(f, 'ratio_corrected')}",
    ),
    Figure(
        "http@xeon",
        "the same on two cores of an Intel Xeon with slower memory",
        lambda f: (
            f"{f['overhead_us_c1']:.0f} µs; {_http(f, 'tabular')}; magika {_http(f, 'magika')}; "
            f"{_one_by_one(f)}"
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
        "labels",
        "labels a second into SQLite: over HTTP, until joined, `hedged labels` with its start; "
        "median of a prediction with the ledger over without",
        lambda f: (
            f"{f['rows_per_second']:,.0f}, {f['joined_per_second']:,.0f}, "
            f"{f['cli_rows_per_second']:,.0f}; {f['ratio_p50_with_ledger']:.2f}"
        ),
    ),
    Figure(
        "drift",
        "change points, worst of nine cells of outliers: false alarms in 1,000, share of 2σ shifts "
        "found within 30",
        lambda f: "; ".join(
            f"{r['detector']}{' (default)' * (r['detector'] == f['default'])} "
            f"{r['false_alarms_per_1000']:.3f}, {r['found_within_30']:.3f}"
            for r in f["table"]
        ),
    ),
    Figure(
        "monitors",
        "false alarms, ever, of healthy streams at 5 % and at 1 %, the worst case of each: "
        "martingale, risk monitor; a martingale on the served p-value",
        lambda f: f"{'; '.join(_alarms(f, *of) for of in _MONITORS)} ({f['streams']:,} streams)",
    ),
    Figure(
        "monitors",
        "observations a second of one core: martingale, risk monitor",
        lambda f: ", ".join(f"{f['per_second'][k]:,.0f}" for k in ("martingale", "risk_monitor")),
    ),
    Figure(
        "folds",
        "10 million scores: conformal quantile; p-values of a million rows; the additive metrics "
        "over 10 million rows, all in constant memory",
        lambda f: (
            f"{f['quantile_seconds']:.1f} s; {f['pvalue_seconds']:.1f} s; "
            f"{f['seconds_10m_rows']:.1f} s, {'yes' if f['constant_memory'] else 'no'}"
        ),
    ),
    Figure(
        "shift_kinds",
        "kind of shift told of windows of 1,000 rows: any kind of unshifted ones; all "
        "rows told of new classes of at most two fifths",
        lambda f: f"{f['false_kind'][0]:.3f}; {f['all_rows_excludes'][0]:.3f}",
    ),
)
