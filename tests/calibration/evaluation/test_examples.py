"""Worst rows, sizes by part, confidences and R-AUROC, against slow loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from calibration.evaluate import evaluate
from calibration.evaluation import Evaluation
from calibration.evaluation.parts import Named
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.predictor import Predictor
from calibration.report import render
from tests import factory
from tests.calibration import networks, simulated
from tests.calibration.pages import read

N = 300


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factory.data(tmp_path_factory.mktemp("examples") / "fresh.parquet", n=N, seed=80)


@pytest.fixture(scope="module")
def found(classification_bundle: Path, fresh: Path) -> Evaluation:
    return evaluate(classification_bundle, fresh)


def test_the_surest_wrong_rows(classification_bundle: Path, found: Evaluation) -> None:
    x, y = factory.rows("classification", N, 80)
    got = Predictor(classification_bundle).run({"x": x})
    wrong = [i for i in range(N) if got["label"][i] != y[i]]
    order = sorted(wrong, key=lambda i: -float(got["confidence"][i]))[:20]
    assert [w.row for w in found.worst] == order
    for w in found.worst:
        assert w.id == f"r{w.row}" and w.truth != w.answer
        assert w.truth == factory.CLASSES[y[w.row]]
        assert w.answer == factory.CLASSES[got["label"][w.row]]
        assert w.doubt == pytest.approx(float(got["confidence"][w.row]))
        assert w.flagged == bool(got["ood"][w.row] or got["abstain"][w.row])
    page = read(render(found)).text
    assert "Confident and wrong" in page and f"r{order[0]}" in page


def test_rows_are_counted_in_the_table_as_given(
    classification_bundle: Path, fresh: Path, found: Evaluation, tmp_path: Path
) -> None:
    """Rows of the fit and a faulty one before them move the places, and nothing else."""
    own = pq.read_table(classification_bundle.with_name("bundle.parquet")).slice(0, 300)
    whole = pa.concat_tables([own, pq.read_table(fresh)])
    a = whole["a"].to_numpy().copy()
    a[300 + 299] = np.nan
    pq.write_table(whole.set_column(0, "a", pa.array(a)), tmp_path / "both.parquet")
    both = evaluate(classification_bundle, tmp_path / "both.parquet")
    known = {w.id: w.row for w in both.worst}
    later = [w for w in found.worst if w.id in known and w.row != 299]
    assert later and both.n > N - 1
    own_ids = {w.id for w in both.worst if w.row < 300}
    assert all(known[w.id] == w.row + 300 or w.id in own_ids for w in later)


def test_the_rows_furthest_off(regression_bundle: Path, tmp_path: Path) -> None:
    data = factory.data(tmp_path / "values.parquet", "regression", n=N, seed=81)
    found = evaluate(regression_bundle, data)
    x, y = factory.rows("regression", N, 81)
    got = Predictor(regression_bundle).run({"x": x})
    off = np.abs(y - got["mean"][:, 0]) / got["std"][:, 0]
    assert [w.row for w in found.worst] == np.argsort(-off)[:20].tolist()
    assert found.worst[0].doubt == pytest.approx(off.max(), rel=1e-5)
    assert float(found.worst[0].truth) == pytest.approx(y[off.argmax()], rel=1e-4)
    assert found.retrieved is None


def test_sizes_by_answer_and_by_group(classification_bundle: Path, found: Evaluation) -> None:
    x, y = factory.rows("classification", N, 80)
    got = Predictor(classification_bundle).run({"x": x})
    size = got["set"].sum(1)
    assert found.spreads is not None and found.spreads.by == "answer"
    assert sum(p.n for p in found.spreads.parts) == N
    for p in found.spreads.parts:
        mine = [i for i in range(N) if factory.CLASSES[got["label"][i]] == p.name]
        assert p.n == len(mine)
        assert p.mean == pytest.approx(size[mine].mean())
        assert p.coverage == pytest.approx(np.mean([got["set"][i, y[i]] for i in mine]))
        ordered = sorted(int(s) for s in size[mine])
        for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), p.quantiles, strict=True):
            assert sum(s <= value for s in ordered) >= share * len(mine)
            assert sum(s < value for s in ordered) < share * len(mine)
    names = np.array(["north", "south", "east"])[np.arange(400) % 3]
    grouped = simulated.regression(n=400, named=Named(names, {})).spreads
    assert grouped is not None and grouped.by == "group"
    assert {p.name for p in grouped.parts} == {"north", "south", "east"}
    fifths = simulated.regression(n=400).spreads
    assert fifths is not None and [p.n for p in fifths.parts] == [80] * 5
    assert [p.name[0] for p in fifths.parts] == list("12345")


def test_confidences_of_test_rows_and_strange_ones(
    classification_bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    x, _ = factory.rows("classification", 90, 82)
    columns = {c: 5 * x[:, i] for i, c in enumerate(factory.COLUMNS["classification"])}
    pq.write_table(pa.table(columns), tmp_path / "far.parquet")
    found = evaluate(classification_bundle, fresh, ood_data={"far": tmp_path / "far.parquet"})
    histogram = found.confidences
    assert histogram is not None and (histogram.edges[0], histogram.edges[-1]) == (0, 1)
    far = Predictor(classification_bundle).run({"x": 5 * x})["confidence"]
    counts = [0] * 40
    for c in far:
        counts[min(39, int(float(c) * 40))] += 1
    assert histogram.shares["far"] == pytest.approx([c / 90 for c in counts])


def test_r_auroc_by_a_slow_loop(classification_bundle: Path, found: Evaluation) -> None:
    """On the tanh units of the network's written weights, which no file of the bundle names."""
    x, y = factory.rows("classification", N, 80)
    t = factory.weights("classification")
    phi = np.tanh(x @ t["w1"] + t["b1"]).astype(np.float64)
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    right = []
    for i in range(N):
        near = unit @ unit[i]
        near[i] = -2
        right.append(y[near.argmax()] == y[i])
    got = Predictor(classification_bundle).run({"x": x})
    assert found.retrieved is not None and found.retrieved.n == N
    assert found.retrieved.recall_at_1 == pytest.approx(np.mean(right), abs=2 / N)
    doubts = {"confidence": -got["confidence"], "hedged": got["ood_score"]}
    for name, doubt in doubts.items():
        want = roc_auc_score(~np.array(right), doubt)
        assert found.retrieved.r_auroc[name] == pytest.approx(want, abs=0.01)
    assert "Does the doubt transfer?" in render(found)


def test_a_black_box_has_no_features(tmp_path: Path) -> None:
    model = networks.black_box(tmp_path / "black.onnx")
    data = networks.table(model, 800)
    bundle = fit(
        model,
        data,
        tmp_path / "bundle",
        FitOptions(task="classification", method="none"),
        columns=networks.columns(model),
        cache_dir=tmp_path / "cache",
    )
    assert evaluate(bundle, data).retrieved is None
