"""A torch classifier that somebody else trained, exported at fit time: MNIST digits as its rows,
Fashion-MNIST as what it was never taught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.assets import fashion_mnist, mnist, mnist_input, mnistnet
from bench.material import Known, mnist_net
from bench.resplits import figures
from calibration.bundle import Bundle
from calibration.fit import fit_material, write
from calibration.fit_options import FitOptions
from calibration.material import Material
from calibration.predictor import Predictor
from posthoc.runtime import open_session

SEEDS = 20


@pytest.fixture(scope="module")
def known() -> Known:
    return mnist_net()


@pytest.fixture(scope="module")
def splits(known: Known) -> list[dict[str, Any]]:
    return [figures(known, seed) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def bundle(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    material: Material = known.material
    options = FitOptions(task="classification")
    fitted, _, roles = fit_material(material, options)
    out = tmp_path_factory.mktemp("mnist") / "bundle"
    return write(material, fitted, roles, out, options, known.data, name="mnistnet")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return mnist_input(mnist()[0])


def test_the_exported_graph_is_the_torch_model(known: Known, images: np.ndarray) -> None:
    import torch

    with torch.inference_mode():
        want = mnistnet()(torch.from_numpy(images[:256])).numpy()
    (got,) = open_session(known.model.read_bytes()).run(None, {"image": images[:256]})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert known.material.frozen.head is not None  # its last linear layer was found


@pytest.mark.parametrize("batch", [1, 32, 250])
def test_the_frozen_output_is_kept_bit_for_bit(
    known: Known, bundle: Bundle, images: np.ndarray, batch: int
) -> None:
    output = bundle.manifest.frozen.output
    assert output is not None
    predictor = Predictor(bundle)
    bare = open_session(known.model.read_bytes())
    for x in (images[:batch], mnist_input(fashion_mnist()[0][:batch])):
        got = predictor.run({"image": x}, outputs=[*predictor.fields, output])
        (own,) = bare.run([output], {"image": x})
        np.testing.assert_array_equal(got[output], own)
        np.testing.assert_array_equal(got["label"], own.argmax(1))


def test_ten_thousand_labels_are_the_frozen_models(
    known: Known, bundle: Bundle, images: np.ndarray
) -> None:
    predictor = Predictor(bundle)
    bare = open_session(known.model.read_bytes())
    y = mnist()[1]
    right = [0, 0]
    for at in range(0, len(images), 1000):
        x = images[at : at + 1000]
        got = predictor.run({"image": x}, outputs=["label"])["label"]
        own = bare.run(None, {"image": x})[0].argmax(1)
        np.testing.assert_array_equal(got, own)
        for i, label in enumerate((own, got)):
            right[i] += int((label == y[at : at + 1000]).sum())
    assert right[0] == right[1] > 9_000


def test_the_bundle_stands_by_itself(bundle: Bundle) -> None:
    Predictor(bundle).self_check()
    m = bundle.manifest
    assert m.data["bad_rows"] == 0 and sum(m.splits.rows.values()) == 10_000
    assert max(m.data["head_max_difference"].values()) < 1e-5


def test_labels_are_kept_on_every_split(splits: list[dict[str, Any]]) -> None:
    assert [s["labels_equal"] for s in splits] == [1.0] * SEEDS


@pytest.mark.parametrize("alpha", ["0.1", "0.05"])
def test_raw_sets_cover_inside_the_band(splits: list[dict[str, Any]], alpha: str) -> None:
    """Both edges, since LAC's scores do not tie here (see below)."""
    inside = sum(s["band"][alpha][0] <= s["coverage"][alpha] <= s["band"][alpha][1] for s in splits)
    assert inside >= 18
    # A network right on nearly every row has empty sets where it is least sure, and says so.
    assert all(s["empty"][alpha] <= float(alpha) + 0.02 for s in splits)


def test_conformal_scores_do_not_tie(bundle: Bundle) -> None:
    scores = bundle.conformal_scores["set"]
    for g in bundle.manifest.conformal.guarantees:
        assert (scores == g.threshold).sum() == 1


def test_the_module_costs_no_likelihood(splits: list[dict[str, Any]]) -> None:
    """Mean paired NLL difference to temperature scaling alone; and scaling beats frozen."""
    assert np.mean([s["nll_difference"] for s in splits[:5]]) <= 0.002
    assert np.mean([s["nll_scaled"] - s["nll_frozen"] for s in splits[:5]]) <= 0.001


def test_the_module_is_not_temperature_scaling_in_disguise(splits: list[dict[str, Any]]) -> None:
    for s in splits[:5]:
        assert 1e-6 < s["prior_precision"] < 1e6
        assert s["strength"] > 0
    assert np.mean([s["epistemic_auroc"] for s in splits[:5]]) >= 0.6


def test_fashion_is_told_from_digits_at_least_as_well_as_by_softmax(
    splits: list[dict[str, Any]],
) -> None:
    ours = np.mean([s["ood_auroc"] for s in splits[:5]])
    assert ours >= np.mean([s["msp_auroc"] for s in splits[:5]])
    assert ours > 0.9
