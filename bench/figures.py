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


def _mean(found: Found, key: str) -> float:
    return float(sum(r[key] for r in found["rows"]) / len(found["rows"]))


_MONITORS = (
    ("martingale", "martingale"),
    ("risk_monitor", "risk_monitor"),
    ("martingale", "fixed_reference"),
)


def _alarms(found: Found, monitor: str, column: str) -> str:
    """Share of streams that ever alarmed, at 5 % and at 1 %."""
    shares = [r[column] for r in found["false_alarms"][monitor] if column in r]
    return ", ".join(f"{max(s[a] for s in shares):.3f}" for a in ("0.05", "0.01"))


def _gains(found: Found) -> str:
    table = sorted((r for r in found["table"] if r["family"] == "auto"), key=lambda r: r["excess"])
    return ", ".join(f"{r['set']} {r['excess']:+.3f}" for r in table[:3])


def _tails(found: Found, key: str) -> str:
    """p99 over median on one connection: ours, Starlette, MLServer."""
    tails = found["tabular"]["tail"]
    return ", ".join(f"{tails[side][key]:.1f}" for side in ("ours", "starlette", "mlserver"))


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
        "median on one connection after a burst over before it; p99 over median of requests one "
        "after the other (3 is the aim): ours, Starlette and nothing else, MLServer; the same as "
        "wrk tells it, which adds the requests that a wait held back",
        lambda f: (
            f"{f['ratio_p50_after_burst']:.2f}; {_tails(f, 'ratio')} over "
            f"{f['tabular']['tail']['ours']['requests']:,} requests; "
            f"{_tails(f, 'ratio_corrected')}"
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
        "resplits",
        "magika, seeded re-splits: labels equal to the frozen model's, the least share",
        lambda f: f"{min(r['labels_equal'] for r in f['rows']):.4f} of {f['seeds']} splits",
    ),
    Figure(
        "resplits",
        "NLL, hedged less temperature scaling: mean; splits below zero",
        lambda f: (
            f"{_mean(f, 'nll_difference'):+.4f}; "
            f"{sum(r['nll_difference'] < 0 for r in f['rows'])} of {f['seeds']}"
        ),
    ),
    Figure(
        "resplits",
        "debiased ECE, hedged less temperature scaling: mean of differences and of their limits",
        lambda f: (
            f"{_mean(f, 'ece_difference'):+.4f} ({_mean(f, 'ece_difference_low'):+.4f} to "
            f"{_mean(f, 'ece_difference_high'):+.4f})"
        ),
    ),
    Figure(
        "resplits",
        "coverage inside its 99 % band, by miss rate",
        lambda f: "; ".join(
            f"{alpha}: {n} of {f['seeds']}" for alpha, n in f["inside_band"].items()
        ),
    ),
    Figure(
        "resplits",
        "AUROC for types that it does not know: score, maximum softmax",
        lambda f: f"{_mean(f, 'ood_auroc'):.3f}, {_mean(f, 'msp_auroc'):.3f}",
    ),
    Figure(
        "overhead",
        "throughput of the fused graph with every output over the bare one, batch 32 (batch 1): "
        "magika, MNISTNet, a ResNet-18 with 1,000 classes",
        lambda f: ", ".join(
            f"{f[f'ratio_{m}']:.2f} ({f[f'ratio_{m}_b1']:.2f})"
            for m in ("magika", "mnistnet", "resnet18")
        ),
    ),
    Figure(
        "laplace",
        "Kronecker Laplace predictive a row, over laplace-torch 0.3, one thread, 512 features: 10 "
        "classes, 100 classes; full covariances; diagonal against its fast path; memory over ours, "
        "100 classes; largest difference in float64",
        lambda f: (
            f"{f['ratio_kron_c10']:,.0f}, {f['ratio_kron_c100']:,.0f} times as fast; "
            f"{f['ratio_cov_c10']:,.0f}, {f['ratio_cov_c100']:,.0f}; "
            f"{f['ratio_diag_fast_path']:.1f}; {f['ratio_memory_kron_c100']:,.0f}; "
            f"{f['max_abs_diff']:.0e}"
        ),
    ),
    Figure(
        "fit",
        "Laplace fit on 10,000 cached rows over laplace-torch 0.3 with its loader of 256 rows (at "
        "the batch size that suits it best; over its BackPACK backend): diagonal with 10 classes, "
        "Kronecker with 100",
        lambda f: "; ".join(
            f"{f[f'ratio_{k}']:,.0f} ({f[f'ratio_{k}_best_batch']:,.0f}; "
            f"{f[f'ratio_{k}_backpack']:.1f}) times as fast"
            for k in ("diag_c10", "kron_c100")
        ),
    ),
    Figure(
        "fit",
        "Kronecker fit of 50,000 rows over the sums and decompositions it needs",
        lambda f: f"{f['time_over_floor']:.2f}",
    ),
    Figure(
        "knn",
        "the 50th nearest neighbour, bank of 50,000 rows × 512, one thread, over pytorch-ood 0.4; "
        "difference",
        lambda f: (
            f"{f['ratio_speed']:.2f} times as fast on {f['queries']:,} queries; "
            f"{f['difference']:.0e}"
        ),
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
        "risk",
        "risk control, worst case and procedure: share of splits whose true risk is above its "
        "level, at δ = 0.1 (what chance allows); cases broken",
        lambda f: (
            f"{f['exceed_fraction']:.3f} ({f['allowed_fraction']:.3f}) of {f['splits']} splits; "
            f"{len(f['broken']) or 'none'} of {len(f['table'])}"
        ),
    ),
    Figure(
        "scaling",
        "`--scaling auto`, every classification set: NLL less the temperature's, nats: largest "
        "mean of a set; where it gains most",
        lambda f: f"{f['max_nll_excess']:+.4f}; {_gains(f)} ({f['splits']} splits)",
    ),
    Figure(
        "quantile",
        "probabilistic calibration error of recalibrated quantiles over what chance alone leaves, "
        "worst set (without recalibration)",
        lambda f: (
            f"{f['max_pce_over_floor']:.2f} "
            f"({max(r['over_floor'] for r in f['table'] if r['kind'] == 'none'):.2f}), "
            f"{f['splits']} splits"
        ),
    ),
    Figure(
        "shift_kinds",
        "kind of shift told of windows of 1,000 rows: any kind of unshifted ones; all "
        "rows told of new classes of at most two fifths",
        lambda f: f"{f['false_kind'][0]:.3f}; {f['all_rows_excludes'][0]:.3f}",
    ),
)
