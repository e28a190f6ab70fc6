"""Sets side by side, and the first one spoilt, against slow loops over the predictor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from calibration.corruption import corrupt, measure
from calibration.evaluate import evaluate
from calibration.evaluation import Evaluation
from calibration.evaluation.corrupted import Corrupted, Knowing, Spoiler, asked_for
from calibration.evaluation.records import SetSummary
from calibration.evaluation.sets import Described, SetRows, changes, summarise
from calibration.predictor import Predictor
from posthoc.contract import Array, DataError, TensorSpec
from posthoc.data import open_table, to_rows
from tests import factory
from tests.calibration.evaluation.dense_bundles import restored, scenes, segmented, targets

N, M = 300, 200
SEVERITIES = (2, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def answering(folder: Path) -> Path:
    """A bundle that answers most rows and flags some."""
    return factory.tiny_bundle(folder / "answering", max_error=0.5)


@pytest.fixture(scope="module")
def sets(folder: Path) -> dict[str, str | Path]:
    """A clean set, and one whose inputs are all twice as large."""
    x, y = factory.rows("classification", M, 61)
    columns: dict[str, object] = {
        c: 2 * x[:, i] for i, c in enumerate(factory.COLUMNS["classification"])
    }
    columns |= {"id": [f"s{i}" for i in range(M)], "target": np.asarray(factory.CLASSES)[y]}
    pq.write_table(pa.table(columns), folder / "double.parquet")
    return {
        "clean": factory.data(folder / "clean.parquet", n=N, seed=60),
        "double": folder / "double.parquet",
    }


@pytest.fixture(scope="module")
def found(answering: Path, sets: dict[str, str | Path]) -> Evaluation:
    return evaluate(answering, sets, corrupt=["noise", "missing"], severities=SEVERITIES)


def hashes(bundle: Path, path: str | Path) -> Array:
    m = Predictor(bundle).manifest
    batch = next(open_table(path).batches(10_000))
    return to_rows(batch, m.mapping, m.inputs).content_hashes


def by_name(found: Evaluation) -> dict[str, SetSummary]:
    return {s.name: s for s in found.sets}


def inputs_of(bundle: Path, sets: dict[str, str | Path], name: str) -> tuple[Array, Array]:
    """The inputs of a set as one array, and its labels."""
    if name == "double":
        x, y = factory.rows("classification", M, 61)
        return 2 * x, y
    x, y = factory.rows("classification", N, 60)
    if name != "clean":
        what, severity = name.split()
        keys = hashes(bundle, sets["clean"])
        spoilt = corrupt({"x": x}, what, int(severity), measure({"x": x}), keys=keys)
        x = spoilt["x"]  # type: ignore[call-overload]
    return x, y


def test_every_set_by_a_slow_loop(
    answering: Path, sets: dict[str, str | Path], found: Evaluation
) -> None:
    predictor = Predictor(answering)
    names = ["clean", "double", *(f"{w} {s}" for w in ("noise", "missing") for s in SEVERITIES)]
    assert [s.name for s in found.sets] == names
    for s in found.sets:
        x, y = inputs_of(answering, sets, s.name)
        got = predictor.run({"x": x})
        nll = right = 0.0
        flagged = abstained = answered = wrong = 0
        for i in range(len(y)):
            nll -= math.log(got["probs"][i, y[i]]) / len(y)
            right += float(got["label"][i] == y[i]) / len(y)
            flagged += bool(got["ood"][i])
            abstained += bool(got["abstain"][i])
            if not (got["ood"][i] or got["abstain"][i]):
                answered += 1
                wrong += bool(got["label"][i] != y[i])
        assert s.n == len(y) and s.dropped == s.refused == 0
        assert s.metrics["accuracy"].value == pytest.approx(right)
        assert s.metrics["nll"].value == pytest.approx(nll, rel=1e-5)
        assert s.flagged is not None and s.flagged.value == pytest.approx(flagged / len(y))
        assert s.abstained is not None and s.abstained.value == pytest.approx(abstained / len(y))
        assert s.answered is not None and s.answered.value == pytest.approx(answered / len(y))
        assert s.answered_error is not None and answered
        assert s.answered_error.value == pytest.approx(wrong / answered)
        for level in s.levels:
            mask = predictor.run({"x": x}, q_hat=predictor.q_hat(level.alpha))["set"]
            covered = sum(bool(mask[i, y[i]]) for i in range(len(y))) / len(y)
            assert level.coverage == pytest.approx(covered)
            assert level.mean_size == pytest.approx(mask.sum(1).mean())
            # The luck of as many rows as there are, not of the shift.
            same = len(y) == N
            want = found.levels[s.levels.index(level)]
            assert (level.band_low == want.band_low) == same


def test_the_first_set_is_the_evaluation(found: Evaluation) -> None:
    first, hedged = found.sets[0], found.systems[-1]
    for name, figure in first.metrics.items():
        assert figure.value == pytest.approx(hedged.metrics[name].value, abs=1e-12), name
        assert figure.low == pytest.approx(hedged.metrics[name].low, abs=1e-9), name
    assert [v.coverage for v in first.levels] == [v.coverage for v in found.levels]
    assert found.answered is not None and first.answered is not None
    assert first.answered.value == found.answered.share
    assert first.change == {}


def test_spoilt_rows_are_worse_and_compared_in_pairs(found: Evaluation) -> None:
    sets = by_name(found)
    for name in ("noise 5", "missing 5"):
        assert sets[name].change["nll"].low is not None and sets[name].change["nll"].low > 0
    for s in found.sets[1:]:
        for metric, d in s.change.items():
            want = s.metrics[metric].value - found.sets[0].metrics[metric].value
            assert d.value == pytest.approx(want, abs=1e-9)
            assert d.low is not None and d.high is not None and d.low <= d.value <= d.high
    width = {n: (s.change["nll"].high or 0) - (s.change["nll"].low or 0) for n, s in sets.items()
             if s.change}  # fmt: skip
    assert width["noise 2"] < width["double"]
    assert sets["noise 5"].corruption == "noise" and sets["noise 5"].severity == 5


def test_one_set_is_as_before(answering: Path, sets: dict[str, str | Path]) -> None:
    alone, named = evaluate(answering, sets["clean"]), evaluate(answering, {"a": sets["clean"]})
    assert alone == named and alone.sets == ()
    written = alone.model_dump(mode="json")
    for new in ("sets", "confidences", "spreads", "worst", "retrieved"):
        written.pop(new)
    assert Evaluation.model_validate(written).systems == alone.systems


def test_rows_that_the_fit_saw_are_dropped_from_every_set(
    answering: Path, sets: dict[str, str | Path]
) -> None:
    own = answering.with_name("answering.parquet")
    counts = Predictor(answering).manifest.splits.rows
    found = evaluate(
        answering, {"clean": sets["clean"], "own": own}, corrupt=["noise"], severities=[1]
    )
    assert [(s.n, s.dropped) for s in found.sets] == [
        (N, 0),
        (counts["test"], 4000 - counts["test"]),
        (N, 0),
    ]
    spoilt = evaluate(answering, own, corrupt=["noise"], severities=[1]).sets
    assert {s.n for s in spoilt} == {counts["test"]}


def test_values_by_a_slow_loop(regression_bundle: Path, folder: Path) -> None:
    data = factory.data(folder / "values.parquet", "regression", n=N, seed=70)
    found = evaluate(regression_bundle, {"clean": data}, corrupt=["scaled"], severities=[4])
    x, y = factory.rows("regression", N, 70)
    keys = hashes(regression_bundle, data)
    spoilt = corrupt({"x": x}, "scaled", 4, measure({"x": x}), keys=keys)["x"]  # type: ignore[call-overload]
    predictor = Predictor(regression_bundle)
    for s, inputs in zip(found.sets, (x, spoilt), strict=True):
        got = predictor.run({"x": inputs})
        squares, kept = 0.0, []
        for i in range(N):
            squares += (y[i] - float(got["mean"][i, 0])) ** 2
            if not got["ood"][i]:
                kept.append((y[i] - float(got["mean"][i, 0])) ** 2)
        assert s.metrics["rmse"].value == pytest.approx(math.sqrt(squares / N), rel=1e-6)
        assert s.flagged is not None and s.flagged.value == pytest.approx(1 - len(kept) / N)
        assert s.answered_error is not None
        assert s.answered_error.value == pytest.approx(math.sqrt(sum(kept) / len(kept)), rel=1e-6)
        for level in s.levels:
            q = float(predictor.q_hat(level.alpha))
            covered = np.abs(y - got["mean"][:, 0]) <= q * got["std"][:, 0]
            assert level.coverage == pytest.approx(covered.mean(), abs=1 / N)
    assert found.sets[1].metrics["rmse"].value > 2 * found.sets[0].metrics["rmse"].value


# Differences


def test_a_set_beside_itself_does_not_differ() -> None:
    rng = np.random.default_rng(0)
    a = {"key": np.arange(50), "nll": rng.normal(size=50)}
    same = changes(a, a, ["nll"], seed=1)["nll"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    order = rng.permutation(50)
    moved = changes({k: v[order] for k, v in a.items()}, a, ["nll"], seed=1)["nll"]
    assert moved.low == pytest.approx(0, abs=1e-12) == moved.high


def test_sets_without_a_common_row_are_independent() -> None:
    """The normal interval of a difference of means, and of root means by the delta method."""
    rng = np.random.default_rng(1)
    a = {"key": np.arange(800), "squared_error": rng.gamma(2, 1, 800)}
    b = {"key": 1000 + np.arange(500), "squared_error": rng.gamma(2, 2, 500)}
    a["crps"], b["crps"] = a["squared_error"], b["squared_error"]
    found = changes(a, b, ["crps", "rmse"])
    x, y = a["crps"], b["crps"]
    half = 1.96 * math.sqrt(x.var() / 800 + y.var() / 500)
    value = x.mean() - y.mean()
    assert found["crps"].value == pytest.approx(value)
    assert found["crps"].low == pytest.approx(value - half, abs=0.12 * half)
    assert found["crps"].high == pytest.approx(value + half, abs=0.12 * half)
    root = math.sqrt(x.mean()) - math.sqrt(y.mean())
    half = 1.96 * math.sqrt(x.var() / 800 / 4 / x.mean() + y.var() / 500 / 4 / y.mean())
    assert found["rmse"].value == pytest.approx(root)
    assert found["rmse"].low == pytest.approx(root - half, abs=0.12 * half)


def test_rows_of_one_item_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    of_item = rng.normal(size=40)
    a = {"key": np.repeat(np.arange(40), 10), "nll": np.repeat(of_item, 10)}
    b = {"key": np.arange(40), "nll": np.zeros(40)}
    found = changes(a, b, ["nll"])["nll"]
    half = 1.96 * of_item.std() / math.sqrt(40)
    assert found.low == pytest.approx(of_item.mean() - half, abs=0.2 * half)


def test_rows_without_a_finite_answer_are_refused() -> None:
    rng = np.random.default_rng(3)
    probs = rng.dirichlet([1, 1, 1], 20)
    probs[[2, 5]] = np.nan
    made = {
        "probs": probs,
        "label": np.nan_to_num(probs).argmax(1),
        "confidence": probs.max(1),
        "set@0.1": np.ones((20, 3), bool),
    }
    y = rng.integers(0, 3, 20)
    rows = SetRows("classification", [0.1])
    rows.add(made, y, np.arange(20))
    what = Described("broken", 0)
    found = summarise(rows, what, n_conformal=100, grouped=False, banded=True, n_boot=50)
    assert (found.n, found.refused) == (18, 2)
    kept = np.delete(np.arange(20), [2, 5])
    assert found.metrics["accuracy"].value == (made["label"] == y)[kept].mean()
    assert found.flagged is None and found.answered is None
    none = SetRows("classification", [0.1])
    none.add({k: v[[2, 5]] for k, v in made.items()}, y[[2, 5]], np.arange(2))
    with pytest.raises(DataError, match=r"'broken': no row is left .* 2 have no finite answer"):
        summarise(none, what, n_conformal=100, grouped=False, banded=True)


def test_shares_have_exact_intervals() -> None:
    rows = SetRows("regression", [])
    rng = np.random.default_rng(7)
    made = {"mean": np.zeros((30, 1)), "std": np.ones((30, 1)), "ood": np.arange(30) >= 4}
    rows.add(made, rng.normal(size=30), np.arange(30))
    what = Described("few", 0)
    found = summarise(rows, what, n_conformal=100, grouped=False, banded=True, n_boot=50)
    want = binomtest(26, 30).proportion_ci(method="exact")
    assert found.flagged is not None and found.answered_error is not None
    assert (found.flagged.low, found.flagged.high) == pytest.approx((want.low, want.high))
    assert found.answered_error.low is None  # of four rows nothing is said
    nobody = SetRows("classification", [])
    probs = np.full((5, 2), 0.5)
    sure = {"probs": probs, "label": np.zeros(5, int), "confidence": probs[:, 0]}
    nobody.add({**sure, "ood": np.zeros(5, bool)}, np.zeros(5, int), np.arange(5))
    none = summarise(nobody, what, n_conformal=100, grouped=False, banded=True, n_boot=50)
    assert none.flagged is not None and (none.flagged.value, none.flagged.low) == (0, 0)
    assert none.flagged.high == pytest.approx(binomtest(0, 5).proportion_ci().high)


# Which corruptions


@pytest.mark.parametrize("step", [1, 7, 64])
def test_what_is_known_of_the_columns_does_not_depend_on_the_cut(step: int) -> None:
    x = np.random.default_rng(4).normal(size=(64, 3)).astype(np.float32)
    keys = np.random.default_rng(5).integers(0, 2**63, 64).astype(np.uint64)
    knowing = Knowing(64)
    for at in range(0, 64, step):
        knowing.add({"x": x[at : at + step]}, keys[at : at + step])
    for what in ("missing", "shuffled"):
        one = Spoiler(Corrupted(what, 4), knowing.known(), 0)({"x": x}, keys)["x"]
        whole = corrupt({"x": x}, what, 4, measure({"x": x}), keys=keys)
        assert np.array_equal(one, whole["x"])  # type: ignore[call-overload]


def test_of_a_large_table_some_rows_tell() -> None:
    keys = np.random.default_rng(6).integers(0, 2**64, 4000, dtype=np.uint64)
    x = np.arange(4000.0)[:, None]
    knowing = Knowing(200_000)  # a tenth is asked for
    knowing.add({"x": x}, keys)
    column = knowing.known().reference["x"][0]
    assert 300 < len(column.values) < 500
    lonely = Knowing(10**12)
    lonely.add({"x": x[:5]}, keys[:5])
    assert len(lonely.known().reference["x"][0].values) == 5
    with pytest.raises(DataError, match="no row"):
        Knowing(10).known()


def test_corruptions_that_fit_the_inputs() -> None:
    image = [TensorSpec(name="x", dtype="float32", shape=(-1, 3, 8, 8))]
    asked = asked_for(image, ["all"], [5, 1, 1])
    assert [a.name for a in asked[:2]] == ["noise 1", "noise 5"]
    assert {a.corruption for a in asked} == {"noise", "blur", "occlusion", "contrast"}
    tokens = [TensorSpec(name="x", dtype="int64", shape=(-1, -1))]
    assert [a.name for a in asked_for(tokens, ["all"], [3])] == ["tokens 3"]
    with pytest.raises(DataError, match="is called 'fog'; there are noise, blur, occlusion"):
        asked_for(image, ["noise", "fog"], [1])
    with pytest.raises(DataError, match="severity 0 is none of 1"):
        asked_for(image, ["noise"], [0])
    with pytest.raises(DataError, match="no corruption fits input 'x'"):
        asked_for([TensorSpec(name="x", dtype="bool", shape=(-1, 4))], ["all"], [1])


def test_names_and_tables_are_checked_before_a_pass(answering: Path, folder: Path) -> None:
    told: list[str] = []

    def run(data: dict[str, str | Path], **more: object) -> None:
        evaluate(answering, data, progress=lambda *a: told.append(a[0]), **more)  # type: ignore[arg-type]

    clean = factory.data(folder / "named.parquet", n=20, seed=3)
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        run({"a": clean, "b": folder / "none.parquet"})
    with pytest.raises(DataError, match="'noise 1' is the name of a corrupted set"):
        run({"a": clean, "noise 1": clean}, corrupt=["noise"], severities=[1])
    with pytest.raises(DataError, match="no labelled set"):
        run({})
    assert told == []


# Maps


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_images_side_by_side(task: str, folder: Path) -> None:
    bundle = (segmented if task == "classification" else restored)(folder / task, n=240)
    paths: dict[str, str | Path] = {}
    images = {}
    for name, seed in (("clean", 7), ("new", 8)):
        x, y = scenes(30, seed)
        images[name] = x, y if task == "classification" else targets(y, 3)
        np.savez(folder / f"{task}-{name}.npz", x=x, y=images[name][1])
        paths[name] = folder / f"{task}-{name}.npz"
    found = evaluate(bundle, paths, corrupt=["noise", "occlusion"], severities=[3])
    assert [s.name for s in found.sets] == ["clean", "new", "noise 3", "occlusion 3"]
    assert found.sets[1].metrics == {
        k: v
        for k, v in evaluate(bundle, paths["new"]).systems[-1].metrics.items()
        if k in found.sets[1].metrics
    }
    assert found.sets[0].levels == found.levels
    m = Predictor(bundle).manifest
    x, y = images["clean"]
    rows = to_rows(next(open_table(paths["clean"]).batches(100)), m.mapping, m.inputs)
    spoilt = corrupt({"x": x}, "noise", 3, measure({"x": x}), keys=rows.content_hashes)
    got = Predictor(bundle).run(spoilt)  # type: ignore[arg-type]
    noisy = found.sets[2]
    if task == "classification":
        right = (got["label"] == y).reshape(30, -1).mean(1).mean()
        assert noisy.metrics["accuracy"].value == pytest.approx(right)
    else:
        squares = np.nanmean(((got["mean"] - y) ** 2).reshape(30, -1), axis=1).mean()
        assert noisy.metrics["rmse"].value == pytest.approx(math.sqrt(squares), rel=1e-4)
    if "ood" in got:
        assert noisy.flagged is not None
        assert noisy.flagged.value == pytest.approx(got["ood"].reshape(30, -1).mean())
