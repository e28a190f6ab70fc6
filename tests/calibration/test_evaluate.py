"""The evaluation of a bundle against slow loops over the bare model and the predictor."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from calibration.bundle import REFERENCE, load_bundle
from calibration.evaluate import evaluate, seen_hashes
from calibration.evaluation import Evaluation
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.predictor import Predictor
from posthoc.contract import DataError
from tests import factory
from tests.calibration import networks
from tests.calibration.networks import bare, network, table

N = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def strange(folder: Path) -> Path:
    """Rows five times as far out, with neither label nor id."""
    x, _ = factory.rows("classification", 80, 31)
    columns = {c: x[:, i] * 5 for i, c in enumerate(factory.COLUMNS["classification"])}
    pq.write_table(pa.table(columns), folder / "strange.parquet")
    return folder / "strange.parquet"


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Path:
    return factory.data(folder / "fresh.parquet", n=N, seed=30)


@pytest.fixture(scope="module")
def found(classification_bundle: Path, fresh: Path, strange: Path) -> Evaluation:
    return evaluate(classification_bundle, fresh, ood_data={"far": strange})


def truth() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the fresh rows."""
    return factory.rows("classification", N, 30)


def systems(bundle: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(probabilities, confidence of the frozen label) of the three columns."""
    x, _ = truth()
    p = bare(bundle.with_name("bundle.onnx"), x).astype(np.float64)
    heat = load_bundle(bundle).manifest.scaling["temperature_alone"]
    cooled = p ** (1 / heat)
    cooled /= cooled.sum(1, keepdims=True)
    got = Predictor(bundle).run({"x": x})
    label = p.argmax(1)
    at = np.arange(N), label
    return {
        "frozen": (p, p[at]),
        "temperature scaled": (cooled, cooled[at]),
        "hedged": (got["probs"].astype(np.float64), got["confidence"].astype(np.float64)),
    }


def test_metrics_by_slow_loops(classification_bundle: Path, found: Evaluation) -> None:
    _, y = truth()
    assert found.n == N
    assert [s.name for s in found.systems] == ["frozen", "temperature scaled", "hedged"]
    label = systems(classification_bundle)["frozen"][0].argmax(1)
    for system in found.systems:
        p, confidence = systems(classification_bundle)[system.name]
        nll = brier = right = 0.0
        bins: dict[int, list[float]] = {}
        for i in range(N):
            nll -= math.log(p[i, y[i]])
            brier += sum((p[i, c] - (c == y[i])) ** 2 for c in range(3))
            right += label[i] == y[i]
            gap = float(label[i] == y[i]) - confidence[i]
            bins.setdefault(math.ceil(confidence[i] * 20), []).append(gap)
        ece = sum(abs(sum(gaps)) for gaps in bins.values()) / N
        want = {"accuracy": right / N, "nll": nll / N, "brier": brier / N, "ece": ece}
        for name, value in want.items():
            assert system.metrics[name].value == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert found.label_equal == 1.0


def test_differences_are_of_the_columns(found: Evaluation) -> None:
    metrics = {s.name: s.metrics for s in found.systems}
    assert {d.to for d in found.differences} == {"frozen", "temperature scaled"}
    for d in found.differences:
        want = metrics["hedged"][d.metric].value - metrics[d.to][d.metric].value
        assert d.value == pytest.approx(want, abs=1e-9)
        assert d.low <= d.value <= d.high


def test_coverage_by_a_slow_loop(classification_bundle: Path, found: Evaluation) -> None:
    x, y = truth()
    predictor = Predictor(classification_bundle)
    assert [v.alpha for v in found.levels] == [0.1, 0.05]
    for level in found.levels:
        sets = predictor.run({"x": x}, q_hat=predictor.q_hat(level.alpha))["set"]
        covered = sum(bool(sets[i, y[i]]) for i in range(N))
        assert level.coverage == covered / N
        assert level.mean_size == pytest.approx(sum(int(s.sum()) for s in sets) / N)
        assert level.empty_share == sum(not s.any() for s in sets) / N
        assert level.band_low < level.coverage < level.band_high


def test_strange_rows_by_name(
    classification_bundle: Path, found: Evaluation, strange: Path
) -> None:
    x, _ = truth()
    far = np.stack([c.to_numpy() for c in pq.read_table(strange).columns], 1)
    predictor = Predictor(classification_bundle)
    model = classification_bundle.with_name("bundle.onnx")
    inside, outside = predictor.run({"x": x}), predictor.run({"x": far})
    scores = {
        "hedged": (inside["ood_score"], outside["ood_score"]),
        "epistemic": (inside["epistemic"], outside["epistemic"]),
        "msp": (-bare(model, x).max(1), -bare(model, far).max(1)),
    }
    assert {(o.score, o.out, o.n_out) for o in found.ood} == {(s, "far", 80) for s in scores}
    for o in found.ood:
        low, high = scores[o.score]
        wins = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a in low for b in high)
        assert o.auroc.value == pytest.approx(wins / (N * 80), abs=2e-4)
    assert {h.name for h in found.scores} == scores.keys()
    assert all(h.shares.keys() == {"test rows", "far"} for h in found.scores)


def test_answered_rows_by_a_slow_loop(classification_bundle: Path, found: Evaluation) -> None:
    x, _ = truth()
    got = Predictor(classification_bundle).run({"x": x})
    kept = [i for i in range(N) if not (got["ood"][i] or got["abstain"][i])]
    assert found.answered is not None and found.answered.share == len(kept) / N


# Which rows count


def test_rows_that_the_fit_saw_are_dropped_and_its_test_rows_stay(
    classification_bundle: Path, fresh: Path, folder: Path
) -> None:
    bundle = load_bundle(classification_bundle)
    own = classification_bundle.with_name("bundle.parquet")
    counts = bundle.manifest.splits.rows
    assert len(seen_hashes(bundle)) == sum(counts.values()) - counts["test"]
    found = evaluate(bundle, own)
    assert found.n == counts["test"]
    seen = 4000 - found.n
    assert found.about["rows"].startswith(
        f"{found.n:,} evaluated, {seen:,} dropped that the fit saw"
    )
    # A new row may equal one that was fitted; that it is left out is no secret.
    assert "A new row equal to one" in found.about["rows"]
    both = folder / "both.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(own), pq.read_table(fresh)]), both)
    assert evaluate(bundle, both).n == counts["test"] + N
    assert found.n_conformal == counts["conformal"]


def test_a_row_that_the_fit_saw_is_known_under_another_item(folder: Path) -> None:
    model = network(folder / "items.onnx")
    data = table(model, 1000, item=np.arange(1000) // 2)
    bundle = fit(
        model,
        data,
        folder / "items",
        FitOptions(task="classification"),
        columns=networks.columns(model, split_by="item"),
        cache_dir=folder / "cache",
    )
    whole = pq.read_table(data)
    other = whole.set_column(5, "item", pa.array(np.arange(1000) + 10_000))
    pq.write_table(other, folder / "renamed.parquet")
    assert evaluate(bundle, folder / "renamed.parquet").n == bundle.manifest.splits.rows["test"]


def test_the_bundles_own_figures_are_those_of_its_test_rows(classification_bundle: Path) -> None:
    """The manifest's, by head.onnx on the cache, against the fused graph on the rows."""
    bundle = load_bundle(classification_bundle)
    found = evaluate(bundle, classification_bundle.with_name("bundle.parquet"))
    own = bundle.manifest.evaluation
    assert own["rows"] == found.n
    for system in found.systems:
        if system.name in own:
            for name, value in own[system.name].items():
                assert system.metrics[name].value == pytest.approx(value, abs=1e-4)
    for level in found.levels:
        assert own["levels"][level.level]["coverage"] == pytest.approx(level.coverage, abs=2e-3)


def test_faulty_rows_are_dropped_and_counted(classification_bundle: Path, folder: Path) -> None:
    whole = pq.read_table(factory.data(folder / "part.parquet", n=50, seed=32))
    x = whole["a"].to_numpy().copy()
    x[[3, 4]] = np.nan
    y = whole["target"].to_pylist()
    y[7] = "no class"
    faulty = whole.set_column(0, "a", pa.array(x)).set_column(5, "target", pa.array(y))
    pq.write_table(faulty, folder / "part.parquet")
    found = evaluate(classification_bundle, folder / "part.parquet")
    assert found.n == 47
    assert found.about["rows"] == "47 evaluated, 0 dropped that the fit saw, 3 faulty"


def test_nothing_left_is_an_error(classification_bundle: Path, folder: Path) -> None:
    bundle = load_bundle(classification_bundle)
    own = pq.read_table(classification_bundle.with_name("bundle.parquet"))
    seen = evaluate(bundle, classification_bundle.with_name("bundle.parquet")).n
    pq.write_table(own.slice(0, 0), folder / "none.parquet")
    with pytest.raises(DataError, match="no rows"):
        evaluate(bundle, folder / "none.parquet")
    # Ten rows of the fit's own table, none of them a test row.
    roles = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))["role"].to_pylist()
    used = [i for i, r in enumerate(roles) if r != "test"][:10]
    pq.write_table(own.take(used), folder / "used.parquet")
    with pytest.raises(DataError, match=r"no row is left \(10 were used by the fit or are faulty"):
        evaluate(bundle, folder / "used.parquet")
    assert seen == roles.count("test")


@pytest.mark.parametrize(
    ("drop", "message"),
    [("target", "'target' .*missing"), ("b", "'b' .*missing")],
)
def test_a_table_without_a_column_is_refused(
    classification_bundle: Path, folder: Path, fresh: Path, drop: str, message: str
) -> None:
    path = folder / f"without-{drop}.parquet"
    pq.write_table(pq.read_table(fresh).drop_columns([drop]), path)
    with pytest.raises(DataError, match=message):
        evaluate(classification_bundle, path)


def test_strange_rows_without_one_usable_row_are_refused(
    classification_bundle: Path, fresh: Path, strange: Path, folder: Path
) -> None:
    rows = pq.read_table(strange)
    path = folder / "unusable.parquet"
    pq.write_table(rows.set_column(0, "a", pa.array(np.full(80, np.nan, np.float32))), path)
    with pytest.raises(DataError, match="none of its 80 rows can be used"):
        evaluate(classification_bundle, fresh, ood_data={"bad": path})


def test_progress_and_an_open_predictor(classification_bundle: Path, fresh: Path) -> None:
    told: list[tuple[str, int, int]] = []
    predictor = Predictor(classification_bundle)
    again = evaluate(predictor, fresh, progress=lambda *a: told.append(a))
    assert told == [(what, n, N) for what in ("evaluate", "features") for n in (256, N)]
    assert again == evaluate(classification_bundle, fresh)


@pytest.mark.parametrize("name", ["probs", "label", "confidence", "uq_logits"])
def test_a_frozen_output_named_like_a_field_is_still_the_frozen_one(
    folder: Path, name: str
) -> None:
    """The same network with its output under another name: the same report."""
    reports = []
    for output in ("y", name):
        model = network(folder / f"named-{output}.onnx", names={"y": output})
        data = table(model, 1000)
        out = folder / f"bundle-{name}-{output}"
        bundle = fit(
            model,
            data,
            out,
            FitOptions(task="classification"),
            columns=networks.columns(model),
            cache_dir=folder / "cache",
        )
        reports.append(evaluate(bundle, data).systems)
    assert reports[0] == reports[1]
    nll = {s.name: s.metrics["nll"].value for s in reports[1]}
    assert len(set(nll.values())) == 3


# Regression


def test_regression_by_slow_loops(regression_bundle: Path, folder: Path) -> None:
    data = factory.data(folder / "values.parquet", "regression", n=N, seed=40)
    x, y = factory.rows("regression", N, 40)
    far = folder / "far.parquet"
    columns = {c: x[:90, i] * 4 for i, c in enumerate(factory.COLUMNS["regression"])}
    pq.write_table(pa.table(columns), far)
    found = evaluate(regression_bundle, data, ood_data={"far": far})
    predictor = Predictor(regression_bundle)
    got = predictor.run({"x": x})
    mean, std = got["mean"][:, 0].astype(np.float64), got["std"][:, 0].astype(np.float64)
    m = predictor.manifest
    noise = predictor.bundle.tensors("state.safetensors")["noise"][0]
    constant = math.sqrt(noise) * m.scaling["temperature_alone"]
    stds = {"constant error bar": np.full(N, constant), "hedged": std}
    assert [s.name for s in found.systems] == list(stds)
    for system in found.systems:
        s = stds[system.name]
        squares = sum((y[i] - mean[i]) ** 2 for i in range(N)) / N
        nll = sum(-norm.logpdf(y[i], mean[i], s[i]) for i in range(N)) / N
        assert system.metrics["rmse"].value == pytest.approx(math.sqrt(squares), rel=1e-6)
        assert system.metrics["nll"].value == pytest.approx(nll, rel=1e-5, abs=1e-6)
        crps = sum(crps_by_integral(y[i], mean[i], s[i]) for i in range(N)) / N
        assert system.metrics["crps"].value == pytest.approx(crps, rel=1e-5)
    for level in found.levels:
        q = predictor.q_hat(level.alpha)
        covered = sum(abs(y[i] - mean[i]) <= q * std[i] for i in range(N)) / N
        assert level.coverage == pytest.approx(covered, abs=1 / N)
        assert level.mean_size == pytest.approx(sum(2 * q * s for s in std) / N, rel=1e-5)
    strange = predictor.run({"x": x[:90] * 4})
    pairs = {
        "hedged": (got["ood_score"], strange["ood_score"]),
        "epistemic": (got["epistemic_std"][:, 0], strange["epistemic_std"][:, 0]),
    }
    assert {o.score for o in found.ood} == pairs.keys()
    for o in found.ood:
        low, high = pairs[o.score]
        wins = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a in low for b in high)
        assert o.auroc.value == pytest.approx(wins / (N * 90), abs=2e-4)
        assert o.auroc.value > 0.8
    assert found.quantiles is not None
    for level_q, observed, column in zip(
        found.quantiles.level, found.quantiles.observed, got["quantiles"][:, 0].T, strict=True
    ):
        assert observed == pytest.approx((y <= column).mean(), abs=1 / N)
        assert observed == pytest.approx(level_q, abs=0.1)


def crps_by_integral(y: float, mean: float, std: float) -> float:
    """∫ (F(t) - 1{t >= y})² dt (Gneiting & Raftery 2007, eq. 20)."""
    low, high = min(y, mean - 8 * std), max(y, mean + 8 * std)
    below = quad(lambda t: norm.cdf(t, mean, std) ** 2, low, y)[0]
    return float(below + quad(lambda t: norm.sf(t, mean, std) ** 2, y, high)[0])


def test_a_missing_column_is_named_beside_those_that_are_there(
    classification_bundle: Path, folder: Path
) -> None:
    whole = pq.read_table(factory.data(folder / "lacking.parquet", n=20))
    renamed = whole.rename_columns([{"target": "truth"}.get(n, n) for n in whole.column_names])
    pq.write_table(renamed, folder / "lacking.parquet")
    with pytest.raises(
        DataError, match=r"'target' \(target\) is missing.*has a, b, c, d, id, truth"
    ):
        evaluate(classification_bundle, folder / "lacking.parquet")
