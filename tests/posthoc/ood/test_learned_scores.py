"""The density of Gaussians of the classes, and the loss that a network expects."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import entropy, multivariate_normal

from calibration.metrics.ranking import auroc
from posthoc.contract import Features, FitError
from posthoc.links import softmax
from posthoc.methods import gaussian_head
from posthoc.methods.loss import predictor
from posthoc.ood import expected_loss, gaussian_density, mds, sample
from posthoc.rows import of, take

N, D, C = 600, 5, 3


def rows(seed: int = 0, n: int = N, apart: float = 3.0) -> Features:
    rng = np.random.default_rng(seed)
    y = rng.choice(C, n, p=[0.6, 0.3, 0.1])
    phi = rng.normal(size=(n, D)) @ np.diag([1, 2, 0.5, 1, 1]) + np.eye(C, D)[y] * apart
    return Features(phi, rng.normal(size=(n, C)) * 3, y)


def density(r: Features, n_classes: int = C):
    return gaussian_density.finish(gaussian_density.update(gaussian_density.init(n_classes, D), r))


@pytest.mark.parametrize("apart", [0.5, 3.0, 100.0])
def test_gaussian_density_is_the_mixture_of_scipy(apart: float) -> None:
    r, fresh = rows(apart=apart), rows(1, 80, apart)
    state = density(r)
    rho = state.settings["shrinkage"]
    means = np.stack([r.phi[r.y == c].mean(0) for c in range(C)])
    centred = r.phi - means[r.y]
    s = centred.T @ centred / N
    s = (1 - rho) * s + rho * np.trace(s) / D * np.eye(D)
    parts = [multivariate_normal(m, s).logpdf(fresh.phi) for m in means]
    share = np.log(np.bincount(r.y) / N)
    want = -logsumexp(np.stack(parts, 1) + share, axis=1)
    constant = 0.5 * (D * np.log(2 * np.pi) + np.linalg.slogdet(s)[1])
    got = gaussian_density.score(state, fresh.phi, fresh.z)
    np.testing.assert_allclose(got + constant, want, rtol=1e-5, atol=1e-5)


def test_gaussian_density_classifies_as_the_gaussian_head() -> None:
    r = rows()
    state = density(r)
    given = gaussian_head.Settings(shrinkage=state.settings["shrinkage"])
    stats = gaussian_head.update(gaussian_head.init(None, "classification", given), r)
    head = gaussian_head.finish(stats, None, given)
    said = head.settings
    weight = head.tensors["weight"] * said["temperature"] / said["frozen_temperature"]
    mine = state.tensors["linear"] - state.tensors["linear"].mean(1, keepdims=True)
    np.testing.assert_allclose(mine, weight, rtol=1e-6, atol=1e-9)


def test_gaussian_density_of_one_class_is_half_its_distance() -> None:
    r = rows()
    alone = Features(r.phi, r.z, np.zeros(N, np.int64))
    near = mds.finish(mds.update(mds.init(C, D), alone))
    got = gaussian_density.score(density(alone), r.phi, r.z)
    np.testing.assert_allclose(got, mds.score(near, r.phi, r.z) / 2, rtol=1e-12)
    with pytest.raises(FitError, match="gaussian_density was given no rows"):
        gaussian_density.finish(gaussian_density.init(C, D))
    wider = gaussian_density.score(density(r, C + 3), r.phi, r.z)
    np.testing.assert_array_equal(wider, gaussian_density.score(density(r), r.phi, r.z))


def hard(seed: int, n: int = 3000) -> tuple[Features, np.ndarray]:
    """Rows whose labels are a coin's wherever the first feature is positive, though the outputs
    are as sure there as elsewhere; and which they are."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, 4))
    z = np.stack([4 * phi[:, 1], -4 * phi[:, 1]], 1)
    coin = phi[:, 0] > 0
    y = np.where(coin, rng.integers(0, 2, n), z.argmax(1))
    return Features(phi, z, y), coin


def test_expected_loss_is_the_entropy_of_the_widened_answer() -> None:
    r, _ = hard(0)
    state = expected_loss.finish(expected_loss.update(expected_loss.init(2, 4), r))
    v = predictor.spread(state, r.phi, r.z).variance
    assert v is not None
    p = softmax(r.z / (state.settings["temperature"] * np.sqrt(v))[:, None])
    np.testing.assert_allclose(
        expected_loss.score(state, r.phi, r.z), entropy(p, axis=1), rtol=1e-9, atol=1e-12
    )


def test_expected_loss_finds_the_rows_that_confidence_does_not() -> None:
    r, _ = hard(0)
    state = expected_loss.finish(expected_loss.update(expected_loss.init(2, 4), r))
    fresh, coin = hard(1)
    found = expected_loss.score(state, fresh.phi, fresh.z)
    plain = entropy(softmax(fresh.z), axis=1)
    assert auroc(found[~coin], found[coin]) > 0.8
    assert auroc(plain[~coin], plain[coin]) < 0.55
    # It is a loss, not only an order: a coin's is log 2, and what was sure stays nearly sure.
    assert 0.4 < found[coin].mean() < 0.8 and found[~coin].mean() < 0.25


def test_expected_loss_of_a_regressor_finds_its_noisy_rows() -> None:
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(3000, 4))
    noise = np.where(phi[:, :1] > 0, 2.0, 0.2) * [1.0, 100.0]  # in units a hundred times as large
    z = phi[:, 1:3] * [1.0, 100.0]
    r = Features(phi, z, z + noise * rng.normal(size=z.shape))
    state = expected_loss.finish(expected_loss.update(expected_loss.init(2, 4), r))
    found = expected_loss.score(state, phi, z)
    assert auroc(found[phi[:, 0] < -0.3], found[phi[:, 0] > 0.3]) > 0.9
    v = predictor.spread(state, phi, z).variance
    assert v is not None
    unit = ((r.y - z) ** 2).mean(0)
    np.testing.assert_allclose(found, (v / unit).mean(1), rtol=1e-5)


def test_expected_loss_reads_a_sample_as_the_module_reads_rows() -> None:
    r, _ = hard(0)
    kept = sample.add(sample.empty(expected_loss.ROWS), r)
    module = predictor.fit(of(kept.rows), None, "classification", predictor.Settings())
    halves = [
        expected_loss.update(expected_loss.init(2, 4), take(r, np.arange(len(r)) % 2 == i))
        for i in (0, 1)
    ]
    state = expected_loss.finish(expected_loss.merge(*halves))
    for key, value in module.tensors.items():
        np.testing.assert_array_equal(state.tensors[key], value)


def test_expected_loss_refuses_what_it_cannot_learn_from() -> None:
    r, _ = hard(0, 100)
    empty = expected_loss.init(2, 4)
    with pytest.raises(FitError, match="expected_loss needs at least 20 rows and has 5"):
        expected_loss.finish(expected_loss.update(empty, take(r, slice(5))))
    with pytest.raises(FitError, match="expected_loss needs labels"):
        expected_loss.update(empty, Features(r.phi, r.z))
    with pytest.raises(FitError, match="expected_loss met the label 3"):
        expected_loss.finish(expected_loss.update(empty, Features(r.phi, r.z, np.full(100, 3))))
