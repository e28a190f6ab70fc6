"""The regression against dense algebra, single outputs and the package of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from vbll.layers.regression import Regression

from posthoc import registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.methods.vbll import layer, regression
from posthoc.methods.vbll.coordinates import with_one
from posthoc.rows import of, take
from tests.posthoc.methods.vbll.material import targets

KINDS = ["diagonal", "lowrank", "dense"]


def fit(rows: Features, head: LinearHead, **settings) -> State:
    return registry.fit("vbll", head, "regression", of(rows, 77), settings)


def design(state: State, phi: np.ndarray) -> np.ndarray:
    t = state.tensors
    return with_one((phi - t["centre"]) * t["inverse"])


def one(rows: Features, head: LinearHead, k: int) -> tuple[Features, LinearHead]:
    """Output k alone."""
    pick = slice(k, k + 1)
    return (
        Features(rows.phi, rows.z[:, pick], rows.y[:, pick]),
        LinearHead(head.weight[pick], head.bias[pick]),
    )


def covariance(state: State, k: int) -> np.ndarray:
    t = state.tensors
    if "basis" in t:
        return (t["basis"] * t["spectrum"][:, k]) @ t["basis"].T
    s = np.diag(t["variance"][k])
    return s - t["reduction"][k] @ t["reduction"][k].T if "reduction" in t else s


def test_dense_is_bayesian_linear_regression() -> None:
    head, rows = targets()
    fresh = targets(seed=1)[1]
    state = fit(rows, head)
    s = state.settings
    x, new = design(state, rows.phi), design(state, fresh.phi)
    spread = layer.spread(state, fresh.phi, fresh.z)
    for k in range(2):
        noise, prior = s["noise_variance"][k], s["prior_scale"][k] / x.shape[1]
        cov = np.linalg.inv(x.T @ x / noise + np.eye(x.shape[1]) / prior)
        mean = cov @ x.T @ (rows.y - rows.z)[:, k] / noise
        np.testing.assert_allclose(spread.shift[:, k], new @ mean, rtol=1e-8, atol=1e-10)
        want = np.einsum("np,pq,nq->n", new, cov, new)
        np.testing.assert_allclose(spread.variance[:, k], want, rtol=1e-8)


def test_the_bound_of_a_dense_fit_is_the_log_evidence() -> None:
    head, rows = targets()
    state = fit(rows, head)
    s, total = state.settings, 0.0
    x, r = design(state, rows.phi), rows.y - rows.z
    for k in range(2):
        noise, prior = s["noise_variance"][k], s["prior_scale"][k] / x.shape[1]
        total += multivariate_normal.logpdf(r[:, k], cov=prior * x @ x.T + noise * np.eye(len(x)))
        scale = regression.SCALE * (r[:, k] ** 2).mean()
        total += -regression.DOF * np.log(noise) - scale / (2 * noise)
    assert s["elbo"] * len(rows) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_several_outputs_are_several_fits(kind: str) -> None:
    head, rows = targets(k=3)
    state = fit(rows, head, covariance=kind)
    whole = layer.spread(state, rows.phi, rows.z)
    elbo = 0.0
    for k in range(3):
        part, single = one(rows, head, k)
        alone = fit(part, single, covariance=kind)
        spread = layer.spread(alone, part.phi, part.z)
        np.testing.assert_allclose(spread.variance[:, 0], whole.variance[:, k], rtol=1e-6)
        np.testing.assert_allclose(spread.shift[:, 0], whole.shift[:, k], rtol=1e-6, atol=1e-8)
        elbo += alone.settings["elbo"]
    assert state.settings["elbo"] == pytest.approx(elbo, rel=1e-8)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_the_papers_package_agrees_on_one_output(kind: str) -> None:
    head, rows = targets(k=1)
    state = fit(rows, head, covariance=kind)
    t, s = state.tensors, state.settings
    x, r = design(state, rows.phi), rows.y - rows.z
    noise = s["noise_variance"][0]
    torch.manual_seed(0)
    package = Regression(x.shape[1], 1, 1 / len(x), kind).double()
    package.prior_scale = s["prior_scale"][0] / x.shape[1]
    package.wishart_scale = regression.SCALE * float((r**2).mean())
    assert package.dof == regression.DOF
    with torch.no_grad():
        package.W_mean.copy_(torch.tensor(t["mean"]))
        package.noise_logdiag.fill_(0.5 * np.log(noise))
        if kind == "dense":
            root = np.linalg.cholesky(covariance(state, 0))
            package.W_logdiag.copy_(torch.tensor(np.log(np.diag(root))[None]))
            package.W_offdiag.copy_(torch.tensor(root[None]))
        else:
            package.W_logdiag.copy_(torch.tensor(0.5 * np.log(t["variance"])))
    loss = package(torch.tensor(x)).train_loss_fn(torch.tensor(r))
    loss.backward()
    # The package leaves out the constant of the divergence.
    assert s["elbo"] == pytest.approx(0.5 * x.shape[1] / len(x) - float(loss.detach()), rel=1e-6)
    # And ours is where its ascent would end.
    for parameter in (package.W_mean, package.W_logdiag, package.noise_logdiag):
        assert np.abs(parameter.grad.numpy()).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_learned_variances_top_the_bound(kind: str) -> None:
    head, rows = targets(k=1)
    best = fit(rows, head, covariance=kind).settings
    scale = best["prior_scale"][0]
    for factor in (0.8, 1.25):
        other = fit(rows, head, covariance=kind, prior_scale=scale * factor).settings
        assert other["elbo"] < best["elbo"]
    again = fit(rows, head, covariance=kind, prior_scale=scale).settings
    assert again["elbo"] == pytest.approx(best["elbo"], rel=1e-6)


def test_richer_covariances_have_higher_bounds() -> None:
    head, rows = targets(d=8)
    diagonal, low, dense = (fit(rows, head, covariance=k).settings["elbo"] for k in KINDS)
    assert diagonal < low < dense
    full = fit(rows, head, covariance="lowrank", rank=9)
    assert full.settings["elbo"] == pytest.approx(dense, rel=1e-8)
    np.testing.assert_allclose(covariance(full, 0), covariance(fit(rows, head), 0), rtol=1e-5)


def test_another_unit_of_the_target_changes_nothing_else() -> None:
    head, rows = targets()
    scale = np.asarray([1e3, 1e-3])
    other = Features(rows.phi, rows.z * scale, rows.y * scale)
    for kind in KINDS:
        a, b = fit(rows, head, covariance=kind), fit(other, head, covariance=kind)
        one_, two = (layer.spread(s, rows.phi, rows.z) for s in (a, b))
        np.testing.assert_allclose(two.shift, one_.shift * scale, rtol=1e-5)
        np.testing.assert_allclose(two.variance, one_.variance * scale**2, rtol=1e-5)
        want = np.asarray(a.settings["noise_variance"]) * scale**2
        np.testing.assert_allclose(b.settings["noise_variance"], want, rtol=1e-6)


def test_noise_and_deviation_are_found() -> None:
    head, rows = targets(4000)
    state = fit(rows, head)
    np.testing.assert_allclose(state.settings["noise_variance"], [0.25, 64.0], rtol=0.1)
    left = rows.y - rows.z - layer.spread(state, rows.phi, rows.z).shift
    assert (left.var(0) < 1.1 * np.asarray([0.25, 64.0])).all()


def test_no_prior_variance_is_the_frozen_head() -> None:
    head, rows = targets()
    for kind in KINDS:
        state = fit(rows, head, covariance=kind, prior_scale=1e-12)
        spread = layer.spread(state, rows.phi, rows.z)
        assert np.abs(spread.shift).max() < 1e-6 and spread.variance.max() < 1e-10


def test_emphasised_data_count_as_often() -> None:
    head, rows = targets(10, d=29, k=1)
    state = fit(rows, head, objective="de_elbo")
    assert state.settings["emphasis"] == 3.0
    thrice = take(rows, np.tile(np.arange(10), 3))
    plain = fit(thrice, head)
    np.testing.assert_allclose(state.tensors["mean"], plain.tensors["mean"], rtol=1e-4, atol=1e-9)
    assert state.settings["elbo"] == pytest.approx(plain.settings["elbo"], rel=1e-6)


def test_labels_equal_to_the_outputs_are_an_error() -> None:
    head, rows = targets()
    y = rows.y.copy()
    y[:, 1] = rows.z[:, 1]
    with pytest.raises(FitError, match="output 1 without error"):
        fit(Features(rows.phi, rows.z, y), head)


def test_a_classifiers_setting_is_refused_in_a_regression() -> None:
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(1, 3)), np.zeros(1))
    phi = rng.normal(size=(50, 3))
    z = phi @ head.weight.T
    rows = of(Features(phi, z, z + rng.normal(size=z.shape)))
    with pytest.raises(FitError, match=r"epochs: it is for classifiers"):
        registry.fit("vbll", head, "regression", rows, {"epochs": 3})
