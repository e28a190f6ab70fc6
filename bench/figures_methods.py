"""What is quoted of modules, scores, thresholds and fits."""

from __future__ import annotations

from math import isfinite, nan

from bench.figure import Figure, Found


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


def _mean(found: Found, key: str) -> float:
    return float(sum(r[key] for r in found["rows"]) / len(found["rows"]))


def _gains(found: Found) -> str:
    table = sorted((r for r in found["table"] if r["family"] == "auto"), key=lambda r: r["excess"])
    return ", ".join(f"{r['set']} {r['excess']:+.3f}" for r in table[:3])


_MODELS = ("magika", "mnistnet", "resnet18")


def _compared(found: Found) -> list[Found]:
    """The rows of a table of modules that were fitted and are not the baseline itself."""
    fitted = (r for r in found["table"] if isfinite(r.get("nll_difference", nan)))
    return [r for r in fitted if r["module"] != "none"]


def _heads(found: Found) -> str:
    rows = _compared(found)
    least = min(rows, key=lambda r: r["nll_difference"])
    most = max(rows, key=lambda r: r["nll_difference"])
    return "; ".join(
        (
            f"{len(found['worse'])} of {len(rows)}",
            f"{least['set']} {least['module']} {least['nll_difference']:+.3f}",
            f"{most['set']} {most['module']} {most['nll_difference']:+.3f}",
        )
    )


def _agreement(found: Found) -> str:
    scores = found["agreement"]["scores"].values()
    given = sum(s["given_ours"] for s in scores)
    most = max(s["difference"] for s in scores)
    return f"{most:.0e} of {len(scores)} ({given} of them given our covariance or scale)"


def _dense(found: Found) -> str:
    parts = []
    for name in dict.fromkeys(r["set"] for r in found["table"]):
        rows = [r for r in _compared(found) if r["set"] == name]
        order = sorted(rows, key=lambda r: r["nll_difference"])
        ends = (f"{r['module']} {r['nll_difference']:+.3f}" for r in (order[0], order[-1]))
        parts.append(f"{name}: {', '.join(ends)}")
    return f"{'; '.join(parts)} ({found['splits']} splits)"


def _beside(found: Found, key: str) -> str:
    dense = found["dense"]
    return ", ".join(f"{r[key]:.2f}" for r in (dense, *dense["beside"].values()))


def _abnn(found: Found, key: str, *names: str) -> str:
    return ", ".join(f"{found['table'][name][key]:.4f}" for name in names)


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
        lambda f: ", ".join(f"{f[f'ratio_{m}']:.2f} ({f[f'ratio_{m}_b1']:.2f})" for m in _MODELS),
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
        "heads",
        "every module on every set, beside temperature scaling (a regression: one scale): NLL "
        "less its own, nats: pairs of set and module that are worse by more than 0.002; the "
        "pair that gains most, and the one that loses most",
        _heads,
    ),
    Figure(
        "ood",
        "AUROC for strange rows, six pairs: maximum softmax, the best fixed mixture, `--ood auto`, "
        "with `--corrupt all`; mean regret of the two to the best in hindsight; least gain of auto "
        "over maximum softmax on a pair",
        lambda f: (
            f"{f['mean_auroc_maximum_softmax']:.3f}, {f['mean_auroc_best_fixed']:.3f}, "
            f"{f['mean_auroc_auto']:.3f}, {f['mean_auroc_auto_corrupt']:.3f}; "
            f"{f['mean_regret']['auto']:.3f}, {f['mean_regret']['auto_corrupt']:.3f}; "
            f"{f['least_over_maximum_softmax']:+.3f}"
        ),
    ),
    Figure(
        "ood",
        "flagged clean rows, every set, two levels of p-values and the flag: cells below the 99 % "
        "quantile of their law",
        lambda f: f"{f['flag_cells_inside']:.3f} of {f['flag_cells']}",
    ),
    Figure(
        "ood",
        "scores beside pytorch-ood 0.4 on the same features: largest relative difference",
        _agreement,
    ),
    Figure(
        "compare",
        "`hedged compare` on magika, every module and score: time, most memory of all its "
        "processes, passes of the model over the rows",
        lambda f: (
            f"{f['seconds'] / 60:.1f} min, {f['peak_mb'] / 1000:.1f} GB, {f['model_passes']:.0f} "
            f"({f['candidates']} candidates of {f['modules']} modules, {f['scores']} scores, "
            f"{f['splits']} re-splits)"
        ),
    ),
    Figure(
        "bayescap",
        "BayesCap on normal and Laplace noise: error of β, of the variance (the released loss: β "
        "for 2; variance over the true one)",
        lambda f: (
            f"{100 * f['beta_error']:.1f} %, {100 * f['variance_error']:.1f} % "
            f"({f['released']['normal']['beta']:.2f}; "
            + ", ".join(f"{r['variance_ratio']:.1f}" for r in f["released"].values())
            + ")"
        ),
    ),
    Figure(
        "bayescap",
        "BayesCap on photos behind a super-resolution network: NLL less that of one error bar, "
        "nats; uncertainty calibration error over the released loss's",
        lambda f: (
            f"{f['dense']['nll_difference']:+.3f} "
            f"({f['dense']['nll_difference_interval'][0]:+.3f} to "
            f"{f['dense']['nll_difference_interval'][1]:+.3f}, {f['dense']['photos']} photos); "
            f"{f['uce_ratio']:.2f}"
        ),
    ),
    Figure(
        "bayescap",
        "correlation of σ with the error there, and AUSE: BayesCap, test-time augmentation, "
        "dropout left on (a random order)",
        lambda f: (
            f"{_beside(f, 'correlation')}; {_beside(f, 'ause')} ({f['dense']['ause_random']:.2f})"
        ),
    ),
    Figure(
        "dropout",
        "dropout before the head, 32 masks: throughput over the bare graph, batch 32: magika, "
        "MNISTNet, a ResNet-18",
        lambda f: ", ".join(f"{f['head'][m]['ratio']:.2f}" for m in _MODELS),
    ),
    Figure(
        "dropout",
        "ten masks inside a network, over the prefix once and the suffix ten times, by depth from "
        "the first dropout on (the frozen answer is an eleventh)",
        lambda f: ", ".join(f"{r['cost_over_ideal']:.2f}" for r in f["inside"]),
    ),
    Figure(
        "abnn",
        "ABNN, 3 members of 10 samples, torch-uncertainty 0.13 over ours: seconds a row; memory of "
        "the process; what of it predicting adds to the imported libraries",
        lambda f: (
            f"{f['ratio_speed']:.1f}; {f['ratio_memory']:.1f}; {f['ratio_memory_rise']:.2f} "
            "(below 1: ours adds more)"
        ),
    ),
    Figure(
        "abnn",
        "its accuracy: frozen, ours, theirs (ours less frozen); NLL: temperature scaling, ours, "
        "theirs",
        lambda f: (
            f"{_abnn(f, 'accuracy', 'frozen', 'abnn', 'peer')} "
            f"({f['accuracy_difference']['value']:+.4f}, "
            f"{f['accuracy_difference']['low']:+.4f} to {f['accuracy_difference']['high']:+.4f}); "
            f"{_abnn(f, 'nll', 'temperature', 'abnn', 'peer')} on {f['rows']:,} images"
        ),
    ),
    Figure(
        "dense",
        "modules on maps, NLL less that of scaling alone, nats a pixel: the best and the worst of "
        "each set",
        _dense,
    ),
)
