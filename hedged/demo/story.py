"""``hedged demo``: fit, compile, serve, label, watch and score magika, a file-type classifier that
a large company deploys, on files of pinned packages. Every figure is computed here and now."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.bundle import PREDICTOR
from calibration.evaluate import evaluate, seen_hashes
from calibration.evaluation import Evaluation
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from calibration.report import write_report
from hedged.commands import console
from hedged.commands.describe import describe
from hedged.demo import show
from hedged.demo.corpus import build_corpus, magika_input, magika_labels, magika_model
from hedged.demo.examples import examples
from hedged.demo.overhead import throughput_ratio
from hedged.demo.server import Server
from posthoc.contract import Array, HedgedError
from posthoc.data import TableMapping, open_table, to_rows
from service.scoring import score

BATCH = 32
LIVE_BATCHES = 16
QUICK = 0.25  # of the files and of the live batches: enough rows for every promise at its level
THREADS = 2
STRANGE = "types it does not know"


def tell(
    out: Path, *, quick: bool = False, keep_serving: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """The whole story in folder ``out``, of a part of the files if it is to be quick; what it
    measured, as one JSON-able object."""
    share = QUICK if quick else 1.0
    say = show.Silent() if quiet else show.Teller()
    for leftover in ("bundle", "scored", "server"):
        shutil.rmtree(out / leftover, ignore_errors=True)
    say.step("1/6 Files of pinned packages: half whole, half cut to their first 1,024 bytes")
    corpus = build_corpus(out / "data", share=share)
    say.line(
        f"{corpus.n_rows:,} files of {len(corpus.counts)} known types; "
        f"{corpus.n_ood} files of {len(corpus.ood_counts)} types that magika does not know"
    )
    say.step("2/6 Fit post-hoc uncertainty for the frozen model, and compile one graph")
    with console.progress() as report:
        bundle = fit(
            magika_model(),
            corpus.train,
            out / "bundle",
            FitOptions(task="classification"),
            name="magika",
            columns=Columns(target="label", inputs={"bytes": ["bytes"]}, classes=magika_labels()),
            cache_dir=out / "cache",
            threads=THREADS,
            progress=report,
        )
    predictor = Predictor(bundle, threads=THREADS)
    if not quiet:
        describe(bundle)
    say.step("3/6 Evaluate on rows that the fit never used, and write the report")
    with console.progress() as report:
        found = evaluate(predictor, corpus.train, ood_data={STRANGE: corpus.ood}, progress=report)
    write_report(out / "report.html", found)
    live, y = _live_rows(
        predictor, corpus.train, out / "data" / "live.parquet", round(share * LIVE_BATCHES)
    )
    overhead = throughput_ratio(
        magika_model().read_bytes(),
        bundle.files[PREDICTOR],
        {"bytes": live[0]},
        [*predictor.manifest.output_names.values(), "target_label"],
        threads=THREADS,
    )
    story = _figures(found) | {
        "overhead_ratio": overhead["ratio"],
        "bundle": str(out / "bundle"),
        "report": str(out / "report.html"),
    }
    say.step("4/6 Serve it over HTTP; labels arrive later")
    with Server(out / "bundle", out / "server", threads=THREADS) as server:
        say.line(f"serving at {server.url}")
        say.table(show.examples(_try_examples(server)))
        say.line("A flag means: stranger than 95 % of the files it was fitted on.")
        answers = [
            server.infer("magika", {"bytes": x}, predictor.inputs, f"live-{i}")
            for i, x in enumerate(live)
        ]
        story["http_equals_graph"] = all(
            _equal(a, predictor.run({"bytes": x})) for a, x in zip(answers, live, strict=True)
        )
        say.step("5/6 Watch: ECE from Prometheus counters against numpy on the same rows")
        story |= _label_and_watch(server, answers, y)
        say.line(
            f"{story['labels']} → ECE {story['metrics_ece']:.9f} from /metrics, "
            f"{story['numpy_ece']:.9f} from numpy"
        )
        say.step("6/6 Score the same rows in batch, fragment by fragment, exactly once")
        story["score_equals_http"] = _score(out, answers)
        say.line(
            f"batch equals HTTP: {story['score_equals_http']}, "
            f"HTTP equals the graph: {story['http_equals_graph']}"
        )
        say.table(show.comparison(story))
        say.line(f"bundle {story['bundle']} · report {story['report']}")
        if keep_serving:
            say.line(f"still serving at {server.url} (live page at /, metrics at /metrics); Ctrl-C")
            with _until_interrupted():
                server.wait()
    return story


def _figures(found: Evaluation) -> dict[str, Any]:
    """Frozen and hedged accuracy, NLL, ECE and Brier; coverage, set size and OOD AUROC."""
    keys = ("accuracy", "nll", "ece", "brier")
    metrics = {
        s.name: {k: s.metrics[k].value for k in keys}
        for s in found.systems
        if s.name in ("frozen", "hedged", "temperature scaled")
    }
    return {
        "frozen": metrics["frozen"],
        "temperature_scaled": metrics["temperature scaled"],
        "hedged": metrics["hedged"],
        "label_equal": found.label_equal,
        "coverage": {f"{v.alpha:g}": v.coverage for v in found.levels},
        "coverage_band": {f"{v.alpha:g}": [v.band_low, v.band_high] for v in found.levels},
        "set_size": {f"{v.alpha:g}": v.mean_size for v in found.levels},
        "empty_sets": {f"{v.alpha:g}": v.empty_share for v in found.levels},
        "ood_auroc": {o.score: o.auroc.value for o in found.ood},
        "test_rows": found.n,
    }


def _live_rows(
    predictor: Predictor, data: Path, out: Path, batches: int
) -> tuple[list[Array], Array]:
    """Batches of inputs that the fit never used and their classes; the same rows as a table."""
    seen = seen_hashes(predictor.bundle)
    mapping = TableMapping(inputs={"bytes": ("bytes",)}, target=("label",))
    wanted = BATCH * batches
    kept: list[pa.RecordBatch] = []
    inputs: list[Array] = []
    labels: list[Array] = []
    for batch in open_table(data).batches(1024):
        rows = to_rows(
            batch,
            mapping,
            predictor.inputs,
            task="classification",
            classes=predictor.manifest.classes,
        )
        fresh = ~np.isin(rows.content_hashes, seen)
        kept.append(batch.filter(pa.array(fresh)))
        inputs.append(rows.inputs["bytes"][fresh])
        assert rows.y is not None
        labels.append(rows.y[fresh])
    x, y = np.concatenate(inputs)[:wanted], np.concatenate(labels)[:wanted]
    if len(x) < wanted:
        raise HedgedError(f"the corpus left {len(x)} fresh rows; the demo needs {wanted}")
    pq.write_table(pa.Table.from_batches(kept).slice(0, wanted), out)
    return [x[i : i + BATCH] for i in range(0, wanted, BATCH)], y


def _try_examples(server: Server) -> list[dict[str, Any]]:
    """What the service says of files that a person recognises."""
    files = examples()
    rows = [{"bytes": magika_input(e.data).tolist()} for e in files]
    labels = magika_labels()
    outputs = ["label", "probs", "confidence", "set", "epistemic", "ood_pvalue", "ood"]
    found = []
    for level, alpha in (("set", 0.1), ("wide_set", 0.02)):
        body = {"rows": rows, "id": f"example-{level}", "alpha": alpha, "outputs": outputs}
        answers = server.predict(body)
        for i, (file, answer) in enumerate(zip(files, answers, strict=True)):
            if level == "set":
                found.append({"what": file.what, "kind": file.kind, **answer})
            probs = dict(zip(labels, answer["probs"], strict=True))
            found[i][level] = sorted(answer["set"], key=probs.__getitem__, reverse=True)
    return found


def _label_and_watch(server: Server, answers: list[dict[str, Array]], y: Array) -> dict[str, Any]:
    """Send every label (some of them twice), wait for the counters, and compare the two ECEs."""
    labels = {f"live-{i // BATCH}:{i % BATCH}": int(c) for i, c in enumerate(y)}
    counts = server.label(labels)
    again = server.label(dict(list(labels.items())[:50]))
    deadline = time.monotonic() + 60
    while True:
        n = server.counters("uq_labeled_predictions_total")
        if sum(n.values()) >= len(y):
            break
        if time.monotonic() > deadline:
            raise HedgedError(f"only {sum(n.values()):.0f} of {len(y)} labels reached the counters")
        time.sleep(0.2)
    right = server.counters("uq_labeled_correct_total")
    sure = server.counters("uq_labeled_confidence_sum_total")
    from_counters = sum(abs(right[b] - sure[b]) for b in n) / sum(n.values())
    confidence = np.concatenate([a["confidence"] for a in answers]).astype(np.float64)
    correct = np.concatenate([a["label"] for a in answers]) == y
    edges = np.arange(1, 21) / 20
    bins = [np.searchsorted(edges, c, side="left") for c in confidence]
    gaps = [abs((correct - confidence)[np.equal(bins, b)].sum()) for b in range(20)]
    return {
        "metrics_ece": float(from_counters),
        "numpy_ece": float(sum(gaps) / len(y)),
        "labels": f"{counts} and again {again}",
    }


def _score(out: Path, answers: list[dict[str, Array]]) -> bool:
    """Batch-score the live rows; whether the columns equal the HTTP answers, bit for bit."""
    score(
        out / "bundle",
        out / "data" / "live.parquet",
        out / "scored",
        batch_size=BATCH,
        threads=THREADS,
    )
    tables = [pq.read_table(p) for p in sorted((out / "scored").glob("*.parquet"))]
    scored = pa.concat_tables(tables)
    served = {k: np.concatenate([a[k] for a in answers]) for k in answers[0]}
    same = [
        np.array_equal(scored[name].to_numpy(zero_copy_only=False), served[name])
        for name in (
            "confidence",
            "entropy",
            "epistemic",
            "set_size",
            "ood_score",
            "ood",
            "abstain",
        )
    ]
    return all(same)


def _equal(answer: dict[str, Array], graph: dict[str, Array]) -> bool:
    return all(np.array_equal(answer[k], v) for k, v in graph.items())


@contextmanager
def _until_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        return
