"""The evaluation of dense bundles against slow loops over full maps of the predictor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import norm

from calibration.bundle import Bundle
from calibration.evaluate import evaluate
from calibration.evaluation import Evaluation, maps
from calibration.predictor import Predictor
from calibration.report import render
from posthoc.contract import DataError
from posthoc.data import to_rows
from posthoc.pixels import draw
from posthoc.tables import open_table
from tests.calibration.evaluation import dense_bundles
from tests.calibration.evaluation.dense_bundles import restored, scenes, segmented, targets
from tests.calibration.pages import read

N = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Bundle:
    return segmented(folder / "segmenter")


@pytest.fixture(scope="module")
def restorer(folder: Path) -> Bundle:
    return restored(folder / "restorer")


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Path:
    """New images; of the first only two rows have a label."""
    x, y = scenes(N, 7)
    y[0, 2:] = -1
    np.savez(folder / "fresh.npz", x=x, y=y)
    return folder / "fresh.npz"


@pytest.fixture(scope="module")
def strange(folder: Path) -> Path:
    x = np.random.default_rng(3).normal(0, 3, (15, 1, 10, 12)).astype(np.float32)
    np.savez(folder / "strange.npz", x=x)
    return folder / "strange.npz"


@pytest.fixture(scope="module")
def found(segmenter: Bundle, fresh: Path, strange: Path) -> Evaluation:
    return evaluate(segmenter, fresh, ood_data={"noise": strange})


def test_segmentation_by_slow_loops(segmenter: Bundle, fresh: Path, found: Evaluation) -> None:
    data = np.load(fresh)
    x, y = data["x"], data["y"]
    predictor = Predictor(segmenter)
    logits = segmenter.manifest.frozen.logits
    assert logits is not None
    out = predictor.run({"x": x}, outputs=[*predictor.fields, logits])
    z = out[logits].astype(np.float64)
    heat = segmenter.manifest.scaling["temperature_alone"]
    probs = {"hedged": out["probs"].astype(np.float64)}
    for name, t in (("frozen", 1.0), ("temperature scaled", heat)):
        e = np.exp((z - z.max(1, keepdims=True)) / t)
        probs[name] = e / e.sum(1, keepdims=True)
    assert found.n == N and found.label_equal == 1
    for system in found.systems:
        p = probs[system.name]
        want: dict[str, list[float]] = {"accuracy": [], "nll": [], "brier": []}
        gaps: dict[int, float] = {}
        for i in range(N):
            one: dict[str, list[float]] = {k: [] for k in want}
            for r in range(10):
                for c in range(12):
                    t = y[i, r, c]
                    if t < 0:
                        continue
                    label, q = out["label"][i, r, c], p[i, :, r, c]
                    sure = out["confidence"][i, r, c] if system.name == "hedged" else q[label]
                    one["accuracy"].append(float(label == t))
                    one["nll"].append(-math.log(q[t]))
                    one["brier"].append(sum((q[k] - (k == t)) ** 2 for k in range(3)))
                    b = math.ceil(float(np.float32(sure)) * 20)
                    gaps[b] = gaps.get(b, 0.0) + (label == t) - float(sure)
            for k, v in one.items():
                want[k].append(float(np.mean(v)))
        for k, v in want.items():
            assert system.metrics[k].value == pytest.approx(np.mean(v), rel=1e-5), (system.name, k)
        total = (y >= 0).sum()
        ece = sum(map(abs, gaps.values())) / total
        # A float32 softmax lies a hair off this float64 one: a pixel may change its bin.
        assert system.metrics["ece"].value == pytest.approx(ece, abs=5e-4)
    for level in found.levels:
        sets = predictor.run({"x": x}, q_hat=predictor.q_hat(level.alpha))["set"]
        shares, size = [], []
        for i in range(N):
            at = np.argwhere(y[i] >= 0)
            inside = [bool(sets[i, y[i, r, c], r, c]) for r, c in at]
            shares.append(1 - np.mean(inside))
            size.append(np.mean([sets[i, :, r, c].sum() for r, c in at]))
        assert level.coverage == pytest.approx(1 - np.mean(shares))
        assert level.mean_size == pytest.approx(np.mean(size))
        assert level.band_low < level.coverage < level.band_high


def test_strange_images(segmenter: Bundle, fresh: Path, strange: Path, found: Evaluation) -> None:
    predictor = Predictor(segmenter)
    inside = predictor.run({"x": np.load(fresh)["x"]})
    outside = predictor.run({"x": np.load(strange)["x"]})
    by_image = {o.score: o for o in found.ood if "pixel" not in o.score}
    assert by_image.keys() == {"hedged", "msp", "epistemic"}
    for name, field in (("hedged", "ood_score"), ("epistemic", "epistemic")):
        low, high = inside[field].mean((1, 2)), outside[field].mean((1, 2))
        wins = [float(b > a) + 0.5 * (b == a) for a in low for b in high]
        assert by_image[name].auroc.value == pytest.approx(np.mean(wins), abs=2e-3)
        low, high = inside[field].reshape(N, -1), outside[field].reshape(15, -1)
        wins = (high.ravel()[:, None] > low.ravel()).mean()
        (pixel,) = (o for o in found.ood if o.score == f"{name}, pixel by pixel")
        assert pixel.n_out == 15 * 120
        assert pixel.auroc.value == pytest.approx(wins, abs=2e-3)


def test_images_that_the_fit_saw_are_dropped(segmenter: Bundle, folder: Path) -> None:
    own = evaluate(segmenter, folder / "segmenter/data.npz")
    counts = segmenter.manifest.splits.rows
    assert own.n == counts["test"]
    assert own.about["images"].startswith(f"{own.n} evaluated, {400 - own.n} dropped")
    assert own.n_conformal == counts["conformal"]


def test_batches_do_not_matter(
    segmenter: Bundle, fresh: Path, found: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(maps, "_IMAGES", 15)
    again = evaluate(segmenter, fresh, progress=lambda *a: told.append(a))
    assert told == [("evaluate", n, N) for n in (15, 30, 40)]
    for a, b in zip(again.systems, found.systems, strict=True):
        for name, figure in a.metrics.items():
            assert figure.value == pytest.approx(b.metrics[name].value, abs=1e-4)


def test_pictures(segmenter: Bundle, fresh: Path, found: Evaluation) -> None:
    assert found.dense is not None
    titles = [p.title.split()[0] for p in found.dense.pictures]
    assert titles[:3] == ["Hardest", "Median", "Easiest"]
    data = np.load(fresh)
    label = Predictor(segmenter).run({"x": data["x"]}, outputs=["label"])["label"]
    known = data["y"] >= 0
    error = ((label != data["y"]) & known).sum((1, 2)) / known.sum((1, 2))
    hard, middle, easy = found.dense.pictures[:3]
    assert error[hard.row] == error.max() and error[easy.row] == error.min()
    assert sorted(error)[N // 2 - 1] <= error[middle.row] <= sorted(error)[N // 2]
    assert f"{100 * error.max():.2f} % of its pixels wrong" in hard.note
    for picture in found.dense.pictures:
        names = [m.title.split(",")[0] for m in picture.maps]
        assert names == [
            "Input",
            "Prediction",
            "Truth",
            "Wrong pixels",
            "Entropy (nats)",
            "Epistemic part (nats)",
            "Strangeness (OOD score)",
            "Set size at level 90 %",
        ]


def test_channels_last_is_the_same(folder: Path, fresh: Path, found: Evaluation) -> None:
    other = evaluate(segmented(folder / "last", last=True), fresh)
    for a, b in zip(other.systems, found.systems, strict=True):
        for name, figure in a.metrics.items():
            assert figure.value == pytest.approx(b.metrics[name].value, abs=1e-4)
    assert other.levels[0].coverage == pytest.approx(found.levels[0].coverage, abs=1e-3)


def test_several_annotators(segmenter: Bundle, folder: Path, fresh: Path) -> None:
    data = np.load(fresh)
    rng = np.random.default_rng(5)
    y = np.stack([data["y"]] * 3, axis=1)
    other = rng.random(y.shape) < 0.1
    y[other] = rng.integers(0, 3, other.sum())
    np.savez(folder / "many.npz", x=data["x"], y=y)
    many = evaluate(segmenter, folder / "many.npz")
    assert "up to 3 an image" in many.about["annotators"]
    hedged = many.systems[2].metrics
    assert 0 < hedged["ged"].value < 2 and hedged["disagreement"].value > 0
    # The other figures are those of the one map that the image's hash draws.
    table = open_table(folder / "many.npz")
    mapping = segmenter.manifest.mapping.inputs_only()
    batch = next(iter(table.batches(N, ["x"])))
    keys = to_rows(batch, mapping, segmenter.manifest.inputs).content_hashes
    one = y[np.arange(N), (keys % np.uint64(3)).astype(int)]
    np.savez(folder / "one.npz", x=data["x"], y=one)
    alone = evaluate(segmenter, folder / "one.npz")
    assert alone.systems[2].metrics["nll"] == hedged["nll"]
    assert alone.levels == many.levels
    with pytest.raises(DataError, match="'y'"):
        np.savez(folder / "odd.npz", x=data["x"], y=y[:, :, :5])
        evaluate(segmenter, folder / "odd.npz")


def test_images_without_labels_or_faulty_are_dropped(
    segmenter: Bundle, folder: Path, fresh: Path
) -> None:
    data = np.load(fresh)
    x, y = data["x"].copy(), data["y"].copy()
    y[3], x[5, 0, 2, 2] = -1, np.nan
    np.savez(folder / "faulty.npz", x=x, y=y)
    found = evaluate(segmenter, folder / "faulty.npz")
    assert found.n == N - 2 and "2 dropped" in found.about["images"]
    np.savez(folder / "empty.npz", x=x[:2], y=np.full_like(y[:2], -1))
    with pytest.raises(DataError, match=r"no image is left \(2 were"):
        evaluate(segmenter, folder / "empty.npz")
    np.savez(folder / "nothing.npz", x=np.full_like(x[:3], np.nan))
    with pytest.raises(DataError, match="none of its 3 images"):
        evaluate(segmenter, fresh, ood_data={"bad": folder / "nothing.npz"})
    with pytest.raises(DataError, match="range of values"):
        evaluate(segmenter, fresh, data_range=1.0)


def test_a_table_of_nested_lists(segmenter: Bundle, folder: Path, found: Evaluation) -> None:
    data = np.load(folder / "fresh.npz")
    columns = {"x": pa.array(data["x"].tolist()), "y": pa.array(data["y"].tolist())}
    pq.write_table(pa.table(columns), folder / "fresh.parquet")
    assert evaluate(segmenter, folder / "fresh.parquet").systems == found.systems


def test_a_mask(folder: Path, fresh: Path) -> None:
    bundle = segmented(folder / "mask", mask=2)
    found = evaluate(bundle, fresh)
    data, predictor = np.load(fresh), Predictor(bundle)
    inside = predictor.run({"x": data["x"]}, outputs=["set"])["set"][:, 2]
    missed = [(~inside[i])[data["y"][i] == 2].mean() for i in range(N) if (data["y"][i] == 2).any()]
    level = found.levels[0]
    assert level.images is not None and level.images.n == len(missed)
    assert level.images.mean.value == pytest.approx(np.mean(missed))
    assert found.dense is not None
    assert found.dense.pictures[0].maps[-1].title.startswith("Mask of class 2 at level 90 %")
    own = bundle.manifest.evaluation["levels"]["0.9"]
    assert own.keys() == {"missed_pixels", "images_with_class", "mask_share"}
    assert own["missed_pixels"] == pytest.approx(level.images.mean.value, abs=0.1)
    text = read(render(found)).text
    assert "Pixels of class 2 that its mask misses at level 90 %" in text
    assert "Of other classes" in text and "Mean share of pixels" in text


# Image regression


def test_regression_by_slow_loops(restorer: Bundle, folder: Path, strange: Path) -> None:
    x, classes = scenes(N, 8)
    y = targets(classes, 3)
    np.savez(folder / "values.npz", x=x, y=y)
    found = evaluate(restorer, folder / "values.npz", ood_data={"noise": strange}, data_range=1.0)
    predictor = Predictor(restorer)
    out = predictor.run({"x": x})
    noise = restorer.tensors("state.safetensors")["noise"]
    constant = np.sqrt(noise) * restorer.manifest.scaling["temperature_alone"]
    assert found.n == N
    for system in found.systems:
        want: dict[str, list[float]] = {k: [] for k in ("mse", "mae", "nll", "psnr")}
        for i in range(N):
            error, loss = [], []
            for r in range(10):
                for c in range(12):
                    if np.isnan(y[i, :, r, c]).any():
                        continue
                    for k in range(3):
                        mean = float(out["mean"][i, k, r, c])
                        std = float(out["std"][i, k, r, c])
                        if system.name != "hedged":
                            std = constant[k]
                        error.append(float(y[i, k, r, c]) - mean)
                        loss.append(0.5 * (error[-1] / std) ** 2 + math.log(std))
            mse = np.mean(np.square(error))
            want["mse"].append(mse)
            want["mae"].append(np.mean(np.abs(error)))
            want["nll"].append(np.mean(loss) + 0.5 * math.log(2 * math.pi))
            want["psnr"].append(-10 * math.log10(mse))
        assert system.metrics["rmse"].value == pytest.approx(math.sqrt(np.mean(want.pop("mse"))))
        for k, v in want.items():
            assert system.metrics[k].value == pytest.approx(np.mean(v), rel=1e-4, abs=1e-5), k
    for level in found.levels:
        q = predictor.q_hat(level.alpha)
        shares = []
        for i in range(N):
            known = np.isfinite(y[i]).all(0)
            gone = (np.abs(y[i] - out["mean"][i]) > q * out["std"][i]).any(0)
            shares.append(gone[known].mean())
        assert level.coverage == pytest.approx(1 - np.mean(shares), abs=1e-3)
    assert found.quantiles is not None
    known = np.isfinite(y).all(1)
    for at, observed in enumerate(found.quantiles.observed):
        below = y <= out["quantiles"][..., at]
        assert observed == pytest.approx(np.moveaxis(below, 1, -1)[known].mean(), abs=1e-3)
    assert {o.score for o in found.ood} >= {"hedged", "epistemic"}
    assert found.dense is not None
    hard = found.dense.pictures[0]
    assert [m.title.split(",")[0] for m in hard.maps][:4] == [
        "Input",
        "Prediction",
        "Truth",
        "Absolute error",
    ]
    pit = found.systems[1].pit
    assert pit is not None and sum(pit) == found.dense.pixels * 3
    flat = norm.cdf((y - out["mean"]) / out["std"])[np.isfinite(y) & known[:, None]]
    np.testing.assert_allclose(np.array(pit), np.histogram(flat, 20, (0, 1))[0], atol=3)


def test_one_output_without_an_axis_of_its_own_name(folder: Path) -> None:
    bundle = restored(folder / "grey", outputs=1, prediction="module", method="student_t")
    found = evaluate(bundle, folder / "grey/data.npz")
    assert found.n == bundle.manifest.splits.rows["test"]
    assert found.systems[1].metrics["rmse"].value != found.systems[0].metrics["rmse"].value


# What the fit says of itself


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_bundles_own_figures_are_of_its_drawn_pixels(
    task: str, segmenter: Bundle, restorer: Bundle, folder: Path
) -> None:
    bundle = segmenter if task == "classification" else restorer
    name = "segmenter" if task == "classification" else "restorer"
    predictor, own = Predictor(bundle), bundle.manifest.evaluation
    table = open_table(folder / name / "data.npz")
    batch = next(iter(table.batches(400, ["x"])))
    rows = to_rows(batch, bundle.manifest.mapping.inputs_only(), bundle.manifest.inputs)
    hashes = np.asarray(rows.content_hashes)
    test = ~np.isin(hashes, _seen(bundle))
    assert own["rows"] == test.sum()
    data = np.load(folder / name / "data.npz")
    x, y = data["x"][test], data["y"][test]
    flat = y.reshape(len(y), -1) if task == "classification" else y.reshape(len(y), 3, -1)
    known = flat >= 0 if task == "classification" else np.isfinite(flat).all(1)
    index = draw(hashes[test], known, 24)
    for alpha, level in zip((0.1, 0.2), ("0.9", "0.8"), strict=True):
        out = predictor.run({"x": x}, q_hat=predictor.q_hat(alpha))
        if task == "classification":
            sets = out["set"].reshape(len(y), 3, -1)
            inside = np.take_along_axis(sets, np.maximum(flat, 0)[:, None], 1)[:, 0]
        else:
            low, high = (out[k].reshape(len(y), 3, -1) for k in ("lower", "upper"))
            inside = ((low <= flat) & (flat <= high)).all(1)
        shares = 1 - np.take_along_axis(inside, index, 1).mean(1)
        got = own["levels"][level]
        assert got["uncovered_pixels"] == pytest.approx(shares.mean(), abs=2e-3)
        assert got["images_above"] == pytest.approx((shares > alpha).mean(), abs=0.03)
        assert "coverage" not in got


def _seen(bundle: Bundle) -> np.ndarray:
    from calibration.evaluate import seen_hashes

    return seen_hashes(bundle)


def test_scenes_are_not_square() -> None:
    assert dense_bundles.HIGH != dense_bundles.WIDE
