"""Dense bundles behind real servers: maps over both protocols, bounds in bytes, images counted."""

from __future__ import annotations

import concurrent.futures
import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.predictor import Predictor
from service.images import summary
from service.ledger import LabelItem, Ledger
from service.rows import Served, from_json, rows_of, to_json
from service.settings import Settings
from tests.service.conftest import BentoServer, Server
from tests.service.helpers import poll
from tests.service.maps import CLASSES, SIZE, images
from tests.service.pages import browser, tab, visit
from tests.service.streams import Exposition

__all__ = ["browser", "tab", "visit"]


@pytest.fixture(scope="module")
def bento(maps_root, tmp_path_factory):
    home = tmp_path_factory.mktemp("bento")
    with BentoServer(home, HEDGED_BUNDLES=str(maps_root)) as server:
        yield server


@pytest.fixture
def server(maps_root, tmp_path):
    with Server(Settings(bundles=maps_root / "segmenter/1", data_dir=tmp_path)) as running:
        yield running


@pytest.fixture(scope="module")
def direct(maps_root):
    return {name: Predictor(maps_root / name / "1") for name in ("segmenter", "restorer")}


def ask(server, model, x, *, outputs=None, binary=True):
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    wanted = outputs and [triton.InferRequestedOutput(n, binary_data=binary) for n in outputs]
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        return client.infer(model, [tensor], outputs=wanted)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("model", "size"), [("segmenter", (SIZE, SIZE)), ("restorer", (5, 11)), ("restorer", (16, 3))]
)
def test_a_stock_client_gets_the_graphs_maps(bento, direct, model, size, binary):
    x = images(3, 5, size)
    want = direct[model].run({"x": x}, outputs=[*direct[model].fields, "y"])
    got = ask(bento, model, x, outputs=list(want), binary=binary)
    for name, value in want.items():
        np.testing.assert_array_equal(got.as_numpy(name), value)
        assert got.as_numpy(name).dtype == value.dtype
    assert want["ood"].shape == (3, *size)
    assert want["probs" if model == "segmenter" else "quantiles"].shape == (
        (3, 3, *size) if model == "segmenter" else (3, 1, *size, 5)
    )


def test_the_metadata_says_which_axes_are_free(bento):
    with triton.InferenceServerClient(f"127.0.0.1:{bento.port}") as client:
        fixed, free = (client.get_model_metadata(name) for name in ("segmenter", "restorer"))
    assert fixed["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, SIZE, SIZE]}]
    assert free["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, -1, -1]}]
    shapes = {o["name"]: (o["datatype"], o["shape"]) for o in fixed["outputs"]}
    assert shapes["label"] == ("INT64", [-1, SIZE, SIZE])
    assert shapes["set"] == ("BOOL", [-1, 3, SIZE, SIZE])
    shapes = {o["name"]: (o["datatype"], o["shape"]) for o in free["outputs"]}
    assert shapes["quantiles"] == ("FP32", [-1, 1, -1, -1, 5])
    assert shapes["ood"] == ("BOOL", [-1, -1, -1])
    assert fixed["parameters"]["dense"] == {"channels": 1, "spatial": [SIZE, SIZE], "pixels": 16}
    assert fixed["parameters"]["classes"] == list(CLASSES)


def test_images_of_many_sizes_are_answered_side_by_side(bento, direct):
    sizes = [(4 + k % 5, 7 - k % 3) for k in range(24)]
    batches = [images(1 + k % 2, k, size) for k, size in enumerate(sizes)]
    batches[7][0, 1, 2, 3] = np.nan  # and this one alone is refused

    def one(x):
        try:
            return ask(bento, "restorer", x, outputs=["mean", "lower"])
        except triton.InferenceServerException as e:
            return str(e)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, batches))
    assert "row 0 of input 'x' is not finite" in answers[7]
    for k, (x, got) in enumerate(zip(batches, answers, strict=True)):
        if k != 7:
            want = direct["restorer"].run({"x": x}, outputs=["mean", "lower"])
            np.testing.assert_allclose(got.as_numpy("mean"), want["mean"], atol=1e-5)
            np.testing.assert_allclose(got.as_numpy("lower"), want["lower"], atol=1e-5)


def test_plain_json_gives_maps_as_nested_lists(bento, direct):
    x = images(2, 6)
    levels = [0.2, 0.13]
    q_hat = np.array([direct["segmenter"].q_hat(a) for a in levels], np.float32)
    want = direct["segmenter"].run({"x": x}, q_hat=q_hat)
    post = bento.client.post
    rows = [{"x": image} for image in x.tolist()]
    answer = post("/v1/models/segmenter/predict", json={"rows": rows, "alpha": levels}).json()
    asked = post(
        "/v1/models/segmenter/predict",
        json={"inputs": {"x": x.tolist()}, "alpha": levels, "outputs": ["set", "probs"]},
    ).json()
    assert answer["classes"] == list(CLASSES)
    for k, (plain, long) in enumerate(
        zip(answer["predictions"], asked["predictions"], strict=True)
    ):
        assert "probs" not in plain
        assert "set" not in plain
        for name in ("label", "confidence", "set_size", "ood", "abstain"):
            np.testing.assert_array_equal(np.asarray(plain[name], want[name].dtype), want[name][k])
        assert isinstance(plain["ood"][0][0], bool)
        np.testing.assert_array_equal(long["set"], want["set"][k])
        np.testing.assert_array_equal(np.asarray(long["probs"], np.float32), want["probs"][k])
    x = images(1, 7, (4, 6))
    want = direct["restorer"].run({"x": x}, outputs=["quantiles", "mean"])
    body = {"inputs": {"x": x.tolist()}, "outputs": ["quantiles", "mean"]}
    (image,) = post("/v1/models/restorer/predict", json=body).json()["predictions"]
    np.testing.assert_array_equal(np.asarray(image["mean"], np.float32), want["mean"][0])
    for k, level in enumerate(direct["restorer"].manifest.quantile_levels):
        found = np.asarray(image["quantiles"][format(level, "g")], np.float32)
        np.testing.assert_array_equal(found, want["quantiles"][0][..., k])
    many = {"inputs": {"x": images(17, 8).tolist()}, "alpha": [0.2 + k / 100 for k in range(17)]}
    refused = post("/v1/models/segmenter/predict", json=many)
    assert (refused.status_code, "16 different values" in refused.text) == (400, True)


def test_too_large_an_answer_is_refused_before_it_is_computed(maps_root, tmp_path, direct):
    # 64 pixels and 11 maps of them: about 6 KB of JSON an image, without probs and sets.
    limits = {"max_json_bytes": 8000, "max_answer_bytes": 10_000}
    bundle = maps_root / "segmenter/1"
    with Server(Settings(bundles=bundle, data_dir=tmp_path, **limits)) as server:
        x = images(4, 9)
        body = {"inputs": {"x": x.tolist()}}
        before = Exposition(server.client.get("/metrics").text)
        refused = server.client.post("/v1/predict", json=body)
        assert refused.status_code == 413
        error = refused.json()["error"]
        assert error["code"] == "answer_too_large"
        assert "POST /v2/models/segmenter/infer with binary_data_output" in error["message"]
        few = server.client.post("/v1/predict", json={**body, "outputs": ["label"]})
        assert few.status_code == 200
        with pytest.raises(triton.InferenceServerException, match="bytes of JSON"):
            ask(server, "segmenter", x, outputs=["confidence", "entropy", "probs"], binary=False)
        ask(server, "segmenter", x, outputs=["confidence", "probs"])
        with pytest.raises(triton.InferenceServerException, match="name fewer outputs"):
            ask(server, "segmenter", x)
        got = ask(server, "segmenter", x, outputs=["set"]).as_numpy("set")
        np.testing.assert_array_equal(got, direct["segmenter"].run({"x": x})["set"])
        after = Exposition(server.client.get("/metrics").text)
        for outcome, rows in (({"outcome": "rejected"}, 12), ({}, 24)):
            key = {"model": "segmenter", "version": "1", **outcome}
            name = "uq_predictions_total"
            assert after.total(name, **key) - before.total(name, **key) == rows


def test_the_metrics_and_the_ledger_count_images(server, direct, tmp_path):
    key = {"model": "segmenter", "version": "1"}
    before = Exposition(server.client.get("/metrics").text)
    x = images(5, 10)
    want = direct["segmenter"].run({"x": x})
    ids = [f"scan-{k}" for k in range(5)]
    body = {"inputs": {"x": x.tolist()}, "ids": ids, "outputs": ["label"]}
    assert server.client.post("/v1/predict", json=body).status_code == 200
    after = Exposition(server.client.get("/metrics").text)

    def moved(name, **labels):
        return after.total(name, **key, **labels) - before.total(name, **key, **labels)

    whole = want["abstain"].all(axis=(1, 2)).sum()
    assert moved("uq_predictions_total", outcome="answered") == 5 - whole
    assert moved("uq_predictions_total", outcome="abstained") == whole
    for name in ("uq_confidence", "uq_ood_pvalue"):
        assert moved(f"{name}_count") == 5
    assert moved("uq_set_size_count", level="0.8") == 5
    means = {k: v.mean(axis=(1, 2), dtype=np.float64) for k, v in want.items() if v.ndim == 3}
    assert moved("uq_expected_correct_total") == pytest.approx(means["confidence"].sum())
    assert moved("uq_ood_total") == pytest.approx(means["ood"].sum())
    assert moved("uq_set_size_sum", level="0.8") == pytest.approx(means["set_size"].sum())
    for name, _ in after.samples:
        if name.startswith(("uq_labeled", "uq_interval", "uq_log_loss", "uq_brier")):
            assert after.values(name, **key) == {}

    def shown():
        return server.client.get("/v1/calibration").json()["models"][0]

    model = poll(shown, lambda m: m["served"] == 5)
    assert (model["labelled"], model["label_coverage"]) == (0, 0.0)
    assert model["expected_accuracy"] == pytest.approx(means["confidence"].mean())
    for name, value in model["images"].items():
        assert value == pytest.approx(means[name].mean()), name
    assert set(model["images"]) == {"confidence", "entropy", "set_size", "ood", "abstain"}


def test_labels_of_maps_are_refused_and_say_what_to_do(server):
    x = images(1, 11)
    body = {"inputs": {"x": x.tolist()}, "ids": ["scan"], "outputs": ["label"]}
    answer = server.client.post("/v1/predict", json=body).json()
    label = {"id": "scan", "label": answer["predictions"][0]["label"]}
    for sent in (label, [{"id": "scan", "label": 1}]):
        refused = server.client.post("/v1/labels", json=sent)
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "labels_of_maps"
        assert "hedged evaluate BUNDLE" in refused.json()["error"]["message"]

    def forgotten():
        return server.client.delete("/v1/predictions/scan").status_code

    poll(forgotten, lambda status: status == 200)
    assert forgotten() == 404


def test_the_page_shows_images(server, visit):
    page = visit(server)
    page.shows("Predictions 0")
    body = {"inputs": {"x": images(3, 12).tolist()}}
    answers = server.client.post("/v1/predict", json=body).json()["predictions"]
    poll(
        lambda: server.client.get("/v1/calibration").json()["models"][0]["served"], lambda n: n == 3
    )
    page.shows("Predictions 3 images")
    mean = np.mean([a["confidence"] for a in answers])
    page.shows(f"Expected accuracy {100 * mean:.1f} %")
    assert page.console == []


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 99), n=st.integers(1, 4), height=st.integers(1, 5))
def test_a_summary_is_means_shares_and_one_pixel(seed, n, height):
    rng = np.random.default_rng(seed)
    shape = (n, height, 3)
    fields = {
        "confidence": rng.random(shape, np.float32),
        "set_size": rng.integers(0, 4, shape),
        "ood": rng.random(shape) < 0.3,
        "abstain": rng.random(shape) < 0.5,
        "ood_pvalue": rng.random(shape, np.float32),
        "probs": rng.random((n, 2, height, 3), np.float32),
    }
    ids = [f"i{seed}-{k}" for k in range(n)]
    found = summary("classification", fields, ids)
    assert set(found) == {"confidence", "set_size", "ood", "abstain", "ood_pvalue"}
    for k in range(n):
        for name in ("confidence", "set_size", "ood", "abstain"):
            pixels = [float(v) for row in fields[name][k] for v in row]
            assert found[name][k] == pytest.approx(sum(pixels) / len(pixels))
        assert found["ood_pvalue"][k] in fields["ood_pvalue"][k]
        alone = summary("classification", {m: v[k : k + 1] for m, v in fields.items()}, ids[k:][:1])
        assert alone == {m: v[k] for m, v in found.items()}
    std = rng.random((n, 2, height, 3), np.float32)
    np.testing.assert_allclose(
        summary("regression", {"std": std}, ids)["std"], [image.mean() for image in std], rtol=1e-6
    )


def test_every_pixel_is_drawn_as_often():
    n, pixels = 4000, 8
    values = np.tile(np.arange(pixels, dtype=np.float32), (n, 1))
    drawn = summary("regression", {"ood_pvalue": values}, [f"id-{k}" for k in range(n)])
    counts = np.bincount(drawn["ood_pvalue"].astype(int), minlength=pixels)
    chi2 = ((counts - n / pixels) ** 2 / (n / pixels)).sum()
    assert chi2 < 24.3  # the 99.9 % quantile with 7 degrees of freedom


def test_images_in_the_ledger(tmp_path):
    ledger = Ledger.open(tmp_path / "l.sqlite")
    ledger.register("m", "1", "a" * 64, task="regression", width=1, levels=["0.9"])
    numbers = {"std": np.array([0.5, 1.5]), "ood": np.array([0.25, 0.0])}
    assert ledger.record_images("m", "1", "a" * 64, ["a", "b"], numbers, "0.9")
    assert ledger.record_images("m", "1", "a" * 64, ["b"], {"std": np.array([9.0])}, "0.9")
    ledger.flush()
    (model,) = ledger.calibration()["models"]
    assert (model["served"], model["labelled"]) == (2, 0)  # a repeated id keeps the first
    assert model["images"] == {"std": 1.0, "ood": 0.125}
    assert ledger.calibration(since=2**40)["models"][0]["served"] == 0
    assert ledger.add_labels([LabelItem("m", "a", 1.0), LabelItem(None, "b", [1.0])]) == [
        "invalid",
        "invalid",
    ]
    assert ledger.sources(3600) == []  # nothing that may still get labels
    assert ledger.forget("a") == 1
    assert ledger.calibration()["models"][0]["images"] == {"std": 1.5, "ood": 0.0}
    ledger.close()
    served = Served("m", "1", "a", ["x"], {"std": np.array([0.5])}, None, None, None, 1.0, True)
    ((source, rows),) = rows_of([served])
    assert source.images
    assert from_json(json.loads(json.dumps(to_json(rows)))) == rows
