"""A bundle taken apart: its head is the one that was fitted, its frozen model the one it got."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save

from calibration.bundle import GOLDEN, HEAD, STATE, Bundle, load_bundle
from calibration.compile import compile_head
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.head import reference
from calibration.predictor import Predictor
from calibration.renew.opened import cut, head_of, take_apart
from posthoc.contract import Array, BundleError
from posthoc.runtime import open_session
from tests.calibration import networks
from tests.calibration.networks import black_box, inputs, network, table
from tests.factory import tiny_bundle
from tests.service.maps import dense_bundle

OPTIONS: list[dict[str, Any]] = [
    {},
    {"method": "none", "ood": "none"},
    {"ood": "rank:gen+rmds"},
    {"ood": "energy+knn", "max_error": None},
    {"ood": "vim", "predictive": "mc"},
    {"given": "class", "alphas": (0.2,)},
    {"given": "cluster", "alphas": (0.2, 0.1)},
    {"conformal": "raps", "randomised": True},
    {"scaling": "svs", "confidence": "beta"},
    {"method": "vbll", "prediction": "module"},
]


def test_a_bundle_made_of_what_was_taken_out_answers_the_same(tmp_path: Path) -> None:
    """Every field of the golden rows, from the float64 reference over the restored head."""
    for i, options in enumerate(OPTIONS):
        bundle = load_bundle(tiny_bundle(tmp_path / f"b{i}", **options))
        opened = take_apart(bundle)
        golden = answers(bundle)
        want = reference(opened.head, opened.features.phi, opened.features.z)
        for name, value in golden.items():
            if name == "ood_pvalue":
                continue
            if value.dtype.kind == "f":
                np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(value, want[name], err_msg=name)


def answers(bundle: Bundle) -> dict[str, Array]:
    with np.load(io.BytesIO(bundle.files[GOLDEN])) as golden:
        return {k[4:]: golden[k] for k in golden.files if k.startswith("out/")}


@pytest.mark.parametrize("method", ["residual", "absolute", "cqr", "cdf"])
@pytest.mark.parametrize("side", ["two", "lower"])
def test_intervals_come_back(tmp_path: Path, method: str, side: Any) -> None:
    bundle = load_bundle(
        tiny_bundle(
            tmp_path / "b", "regression", conformal=method, side=side, tolerance=0.5, max_error=0.3
        )
    )
    opened = take_apart(bundle)
    want = reference(opened.head, opened.features.phi, opened.features.z)
    for name, value in answers(bundle).items():
        if value.dtype.kind == "f" and name != "ood_pvalue":
            np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert (opened.head.interval.method, opened.head.interval.side) == (method, side)


@pytest.mark.parametrize("tail", [("Softmax",), (), ("LogSoftmax",)])
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_the_frozen_model_comes_out_as_it_went_in(
    tmp_path: Path, tail: tuple[str, ...], opset: int
) -> None:
    model = network(tmp_path / "m.onnx", tail=tail, opset=opset)
    bundle = fitted(model, tmp_path)
    frozen, z, phi = cut(bundle)
    x = inputs(100, 5)
    np.testing.assert_array_equal(
        open_session(frozen).run(None, {"x": x})[0], networks.bare(model, x)
    )
    graph, given = onnx.load_from_string(frozen).graph, onnx.load(model).graph
    assert [n.op_type for n in graph.node] == [n.op_type for n in given.node]
    assert [o.name for o in graph.output] == [o.name for o in given.output]
    assert [i.name for i in graph.input] == [i.name for i in given.input]
    assert sorted(i.name for i in graph.initializer) == sorted(i.name for i in given.initializer)
    assert (z, phi) == ("o1" if tail else "y", "h2")


def fitted(model: Path, folder: Path, **options: Any) -> Bundle:
    asked = FitOptions(task="classification", **options)
    return fit(
        model,
        table(model),
        folder / "bundle",
        asked,
        columns=networks.columns(model),
        cache_dir=folder / "cache",
    )


def test_names_like_ours_belong_to_their_owner(tmp_path: Path) -> None:
    """A frozen model that has tensors probs, label and uq/0/Mul."""
    names = {"y": "probs", "h1": "label", "h0": "uq/0/MatMul", "w1": "uq/const/0"}
    model = network(tmp_path / "m.onnx", names=names)
    bundle = fitted(model, tmp_path)
    assert bundle.manifest.output_names["probs"] == "uq_probs"
    frozen, _, _ = cut(bundle)
    x = inputs(50, 5)
    np.testing.assert_array_equal(
        open_session(frozen).run(None, {"x": x})[0], networks.bare(model, x)
    )
    take_apart(bundle)


@pytest.mark.parametrize("out", [1, 2])
@pytest.mark.parametrize("tail", [("Sigmoid",), ()])
def test_two_classes(tmp_path: Path, out: int, tail: tuple[str, ...]) -> None:
    tail = ("Softmax",) if tail and out == 2 else tail
    model = network(tmp_path / "m.onnx", out=out, tail=tail)
    opened = take_apart(fitted(model, tmp_path))
    assert opened.features.z.shape[1] == 2


def test_a_black_box_has_no_features(tmp_path: Path) -> None:
    model = black_box(tmp_path / "box.onnx")
    opened = take_apart(fitted(model, tmp_path, method="none"))
    assert opened.phi is None and opened.features.phi is None and opened.head.features is None


def test_altered_numbers_do_not_come_back_as_a_head(
    classification_bundle: Path, maps_root: Path
) -> None:
    good = load_bundle(classification_bundle)
    for change in ({"temperature": 3.0}, {"strength": 9.0}):
        manifest = good.manifest.model_copy(update={"scaling": {**good.manifest.scaling, **change}})
        with pytest.raises(BundleError, match=r"its head cannot be restored, \w+ differs"):
            take_apart(dataclasses.replace(good, manifest=manifest))
    kept = {k: v for k, v in good.tensors(STATE).items() if not k.startswith("module/")}
    with pytest.raises(BundleError, match="cannot be restored"):
        take_apart(dataclasses.replace(good, files={**good.files, STATE: save(kept)}))
    with pytest.raises(BundleError, match="answers in maps"):
        take_apart(load_bundle(maps_root / "segmenter" / "1"))


@pytest.fixture(scope="module")
def maps_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maps")
    dense_bundle(root / "segmenter" / "1", "segmenter", "classification")
    return root


def test_a_restored_head_compiles_to_the_same_graph(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "b", ood="rank:gen+rmds"))
    assert compile_head(head_of(bundle)) == bundle.files[HEAD]
    Predictor(bundle).self_check()
