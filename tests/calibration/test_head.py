"""The float64 reference of a head against its definitions written as slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibration.compile import check_head, compile_head
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.head import Head, reference
from posthoc import links, registry
from posthoc.contract import Features, LinearHead, State
from tests.calibration.heads import fitted, without_module


@pytest.fixture(scope="module", params=["lac", "raps"])
def classifier(request: pytest.FixtureRequest) -> tuple[Head, Features]:
    done, _, fresh = fitted(conformal=request.param, max_error=0.4)
    return done.head, Features(fresh.phi[:60], fresh.z[:60], fresh.y[:60])


@pytest.fixture(scope="module", params=[1, 2])
def regressor(request: pytest.FixtureRequest) -> tuple[Head, Features]:
    done, _, fresh = fitted("regression", width=request.param, tolerance=1.5, max_error=0.4)
    return done.head, Features(fresh.phi[:60], fresh.z[:60], fresh.y[:60])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def entropy(p: np.ndarray) -> float:
    return -sum(float(v) * math.log(v) for v in p if v > 0)


def test_classes_by_their_definitions(classifier: tuple[Head, Features]) -> None:
    head, rows = classifier
    got = reference(head, rows.phi, rows.z)
    name, state = head.module
    spread = registry.page(name).spread(state, rows.phi, rows.z)
    ood = head.ood
    members = [registry.page(m.name).score(m.state, rows.phi, rows.z) for m in ood.members]
    for i, z in enumerate(rows.z.astype(np.float64)):
        scale = head.temperature * math.sqrt(
            1 + math.pi / 8 * head.strength * float(spread.variance[i])
        )
        p = softmax(z / scale)
        np.testing.assert_allclose(got["probs"][i], p, rtol=1e-10)
        assert got["label"][i] == z.argmax()
        assert got["confidence"][i] == pytest.approx(p[z.argmax()], rel=1e-10)
        assert got["entropy"][i] == pytest.approx(entropy(p), rel=1e-9)
        inside = [set_score(head, p, c) <= head.q_hat for c in range(len(p))]
        assert got["set"][i].tolist() == inside
        assert got["set_size"][i] == sum(inside)
        score = sum(
            (raw[i] - m.mean) / m.scale for raw, m in zip(members, ood.members, strict=True)
        ) / len(members)
        assert got["ood_score"][i] == pytest.approx(score, rel=1e-9)
        assert got["ood"][i] == (score > ood.threshold)
        assert got["abstain"][i] == (not p.max() > head.abstain)


def set_score(head: Head, p: np.ndarray, c: int) -> float:
    """1 - p of the class, or minus the mass below it and a penalty for its rank."""
    if head.conformal == "lac":
        return 1 - float(p[c])
    settings = head.conformal_settings
    rank = 1 + sum(1 for v in p if v > p[c])
    below = sum(float(v) for v in p if v < p[c])
    return -below + settings["penalty"] * max(0, rank - settings["k_reg"])


def test_epistemic_and_aleatoric_by_their_definitions(classifier: tuple[Head, Features]) -> None:
    head, rows = classifier
    got = reference(head, rows.phi, rows.z)
    name, state = head.module
    spread = registry.page(name).spread(state, rows.phi, rows.z)
    for i, z in enumerate(rows.z.astype(np.float64)):
        drawn = []
        for eps in head.eps:
            deviation = (spread.amplitude[i] * eps) @ spread.directions
            drawn.append(softmax(z / head.temperature + math.sqrt(head.strength) * deviation))
        aleatoric = sum(entropy(p) for p in drawn) / len(drawn)
        assert got["aleatoric"][i] == pytest.approx(aleatoric, rel=1e-9)
        total = entropy(np.mean(drawn, axis=0))
        assert got["aleatoric"][i] + got["epistemic"][i] == pytest.approx(total, rel=1e-9)
    assert (got["epistemic"] >= 0).all()
    assert (got["epistemic"] > 0).mean() > 0.9  # a real posterior says something of most rows


def test_draws_are_balanced() -> None:
    """Antithetic pairs: the mean logits over the draws are the frozen ones."""
    eps = links.normal_draws(5, seed=3)
    assert eps.shape == (16, 5)
    np.testing.assert_array_equal(eps[:8], -eps[8:])
    np.testing.assert_array_equal(eps, links.normal_draws(5, seed=3))


@pytest.mark.parametrize("strength", [0.5, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_two_classes_are_averaged_over_their_posterior(strength: float, temperature: float) -> None:
    """MacKay's link against Monte-Carlo over the very draws of the decomposition: one variance a
    row is that of the two logits' difference. The link's own error is below 0.02."""
    rng = np.random.default_rng(0)
    d, amplitude = rng.normal(size=40) * 3, rng.gamma(2.0, 0.7, size=(40, 1))
    direction = np.array([[-0.5, 0.5]])
    z = d[:, None] * direction
    variance = amplitude[:, 0] ** 2
    got = links.softmax(z * links.probit_scale(variance, temperature, strength)[:, None])
    noise = math.sqrt(strength) * rng.normal(size=(40_000, 1, 1)) * amplitude * direction
    want = links.softmax(z / temperature + noise).mean(0)
    assert np.abs(got - want).max() < 0.02


def test_many_classes_are_averaged_over_their_posterior(
    classifier: tuple[Head, Features],
) -> None:
    """One variance a row is coarser; still the link follows the Monte-Carlo mean of a real
    posterior closely, and far more closely than no link at all."""
    head, rows = classifier
    name, state = head.module
    spread = registry.page(name).spread(state, rows.phi, rows.z)
    strength = 1.0 / (math.pi / 8 * float(np.median(spread.variance)))
    eps = np.random.default_rng(0).standard_normal((4000, spread.amplitude.shape[1]))
    want = np.stack(
        [
            links.softmax(z + math.sqrt(strength) * (a * eps) @ spread.directions).mean(0)
            for z, a in zip(rows.z.astype(np.float64), spread.amplitude, strict=True)
        ]
    )
    scale = links.probit_scale(spread.variance, 1.0, strength)
    with_link = np.abs(links.softmax(rows.z * scale[:, None]) - want)
    without = np.abs(links.softmax(rows.z) - want)
    assert with_link.mean() < 0.5 * without.mean()
    assert with_link.mean() < 0.02


def test_at_temperature_one_and_strength_zero_it_is_the_frozen_model(
    classifier: tuple[Head, Features],
) -> None:
    head, rows = classifier
    got = reference(without_module(head), rows.phi, rows.z)
    for i, z in enumerate(rows.z.astype(np.float64)):
        np.testing.assert_allclose(got["probs"][i], softmax(z), rtol=1e-12)
    np.testing.assert_array_equal(got["label"], rows.z.argmax(1))
    np.testing.assert_allclose(got["epistemic"], 0, atol=1e-12)
    np.testing.assert_allclose(got["aleatoric"], got["entropy"], rtol=1e-12)


def test_strength_zero_is_temperature_scaling(classifier: tuple[Head, Features]) -> None:
    head, rows = classifier
    got = reference(head.with_(strength=0.0), rows.phi, rows.z)
    bare = reference(head.with_(module=None, eps=None, strength=3.0), rows.phi, rows.z)
    np.testing.assert_allclose(got["probs"], bare["probs"], rtol=1e-12)
    np.testing.assert_allclose(got["epistemic"], 0, atol=1e-12)
    assert "epistemic" not in bare and "aleatoric" not in bare  # absent, not zero


def test_no_strength_or_temperature_moves_a_label(classifier: tuple[Head, Features]) -> None:
    head, rows = classifier
    for temperature in (0.05, 1.0, 50.0):
        for strength in (0.0, 1.0, 1e4):
            got = reference(
                head.with_(temperature=temperature, strength=strength), rows.phi, rows.z
            )
            np.testing.assert_array_equal(got["label"], rows.z.argmax(1))
            picked = got["probs"][np.arange(len(rows)), got["label"]]
            np.testing.assert_array_equal(got["confidence"], picked)


def test_more_strength_means_less_confidence_and_more_epistemic(
    classifier: tuple[Head, Features],
) -> None:
    head, rows = classifier
    found = [
        reference(head.with_(strength=head.strength * f), rows.phi, rows.z) for f in (0.1, 1, 10)
    ]
    confidence = [f["confidence"] for f in found]
    assert (confidence[0] >= confidence[1]).all() and (confidence[1] >= confidence[2]).all()
    means = [f["epistemic"].mean() for f in found]
    assert means[0] < means[1] < means[2]


def test_values_by_their_definitions(regressor: tuple[Head, Features]) -> None:
    head, rows = regressor
    got = reference(head, rows.phi, rows.z)
    name, state = head.module
    variance = registry.page(name).spread(state, rows.phi, rows.z).variance
    f = head.temperature
    for i, z in enumerate(rows.z.astype(np.float64)):
        for k, mean in enumerate(z):
            aleatoric = f * math.sqrt(head.noise[k])
            epistemic = f * math.sqrt(head.strength * variance[i, k])
            std = math.hypot(aleatoric, epistemic)
            assert got["mean"][i, k] == mean
            assert got["aleatoric_std"][i, k] == pytest.approx(aleatoric, rel=1e-12)
            assert got["epistemic_std"][i, k] == pytest.approx(epistemic, rel=1e-12)
            assert got["std"][i, k] == pytest.approx(std, rel=1e-12)
            assert got["lower"][i, k] == pytest.approx(mean - head.q_hat * std, rel=1e-9)
            assert got["upper"][i, k] == pytest.approx(mean + head.q_hat * std, rel=1e-9)
            quantiles = [mean + std * r for r in head.quantile_factors[k]]
            np.testing.assert_allclose(got["quantiles"][i, k], quantiles, rtol=1e-9)
        assert got["abstain"][i] == (not -got["std"][i].max() > head.abstain)


def test_error_bars_add_up(regressor: tuple[Head, Features]) -> None:
    head, rows = regressor
    got = reference(head, rows.phi, rows.z)
    np.testing.assert_allclose(
        got["std"] ** 2, got["aleatoric_std"] ** 2 + got["epistemic_std"] ** 2, rtol=1e-12
    )
    assert (np.diff(got["quantiles"], axis=2) >= 0).all()
    frozen = reference(without_module(head), rows.phi, rows.z)
    np.testing.assert_array_equal(frozen["mean"], got["mean"])
    np.testing.assert_array_equal(frozen["epistemic_std"], np.zeros_like(got["std"]))
    np.testing.assert_allclose(
        frozen["std"], np.sqrt(np.broadcast_to(head.noise, got["std"].shape))
    )


def test_without_a_module_a_regression_has_one_error_bar() -> None:
    done, _, fresh = fitted("regression", width=2, method="none")
    got = reference(done.head, fresh.phi, fresh.z)
    assert "epistemic_std" not in got and "aleatoric_std" not in got
    assert (got["std"] == got["std"][0]).all()


def test_a_black_box_gives_what_outputs_alone_can() -> None:
    head = Head("classification", 3, None, None, temperature=2.0, q_hat=0.5)
    z = np.array([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    got = reference(head, None, z)
    np.testing.assert_allclose(got["probs"][0], softmax(z[0] / 2))
    assert got["set"].tolist() == [[True, False, False], [False, False, False]]
    assert got.keys() == {
        "label", "probs", "confidence", "entropy",
        "set_scores", "set_thresholds", "set", "set_size",
    }  # fmt: skip


def test_the_threshold_is_an_input(
    classifier: tuple[Head, Features],
) -> None:
    head, rows = classifier
    everything = reference(head, rows.phi, rows.z, q_hat=math.inf)
    assert everything["set"].all() and (everything["set_size"] == 6).all()
    nothing = reference(head, rows.phi, rows.z, q_hat=-math.inf)
    assert not nothing["set"].any()


def test_an_abstention_without_a_threshold_abstains_on_all(
    classifier: tuple[Head, Features],
) -> None:
    head, rows = classifier
    assert reference(head.with_(abstain=None), rows.phi, rows.z)["abstain"].all()
    assert "abstain" not in reference(head.with_(abstains=False), rows.phi, rows.z)


def test_a_module_that_says_nothing_adds_nothing() -> None:
    """Prior precision to infinity: the posterior is a point, whatever the strength."""
    done, _, fresh = fitted()
    name, state = done.head.module
    shut = State(
        {**state.tensors, "shrink": np.zeros_like(state.tensors["shrink"])}, state.settings
    )
    got = reference(done.head.with_(module=(name, shut), strength=100.0), fresh.phi, fresh.z)
    bare = reference(done.head.with_(module=None, eps=None), fresh.phi, fresh.z)
    np.testing.assert_allclose(got["probs"], bare["probs"], rtol=1e-12)
    np.testing.assert_allclose(got["epistemic"], 0, atol=1e-12)


def test_a_score_that_hardly_varies_is_not_blown_up() -> None:
    """An untrained network: all logits near zero, GEN near its maximum on every row."""
    weight = np.random.default_rng(0).normal(size=(5, 16)) * 0.05

    def rows(seed: int, n: int = 500) -> Features:
        own = np.random.default_rng(seed)
        phi = np.maximum(own.normal(size=(n, 16)), 0).astype(np.float32)
        return Features(phi, (phi @ weight.T).astype(np.float32), own.integers(5, size=n))

    for ood in ("auto", "gen"):
        options = FitOptions(task="classification", ood=ood)
        done = fit_head(LinearHead(weight, np.zeros(5)), Parts(rows(1), rows(2), rows(3)), options)
        fresh = rows(4)
        assert (
            check_head(done.head, compile_head(done.head), fresh.phi, fresh.z)["ood_score"] < 1e-5
        )
