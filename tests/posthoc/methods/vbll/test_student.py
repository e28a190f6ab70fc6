"""The Student-t regression against exact algebra, sampling and the package of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from vbll.layers.regression import tRegression

from posthoc import registry
from posthoc.contract import Features, LinearHead, State
from posthoc.methods.vbll import student
from posthoc.methods.vbll.coordinates import with_one
from posthoc.rows import of
from tests.posthoc.methods.vbll.material import targets

KINDS = ["diagonal", "lowrank", "dense"]


def fit(rows: Features, head: LinearHead, **settings) -> State:
    return registry.fit("vbll_t", head, "regression", of(rows, 33), settings)


def exact(state: State, rows: Features, k: int) -> tuple[np.ndarray, ...]:
    """(x, mean, covariance in noise variances, a, b) of the Normal-Gamma posterior of output k."""
    t, s = state.tensors, state.settings
    x, r = with_one((rows.phi - t["centre"]) * t["inverse"]), (rows.y - rows.z)[:, k]
    prior = s["prior_scale"][k] / x.shape[1]
    precision = x.T @ x + np.eye(x.shape[1]) / prior
    mean = np.linalg.solve(precision, x.T @ r)
    a = student.SHAPE + len(x) / 2
    b = student.RATE * (r**2).mean() + 0.5 * (r @ r - mean @ precision @ mean)
    return x, mean, np.linalg.inv(precision), a, b


def test_dense_is_the_normal_gamma_posterior() -> None:
    head, rows = targets(30)
    state = fit(rows, head)
    spread = student.spread(state, rows.phi, rows.z)
    for k in range(2):
        x, mean, cov, a, b = exact(state, rows, k)
        assert state.settings["df"] == pytest.approx(2 * a)
        np.testing.assert_allclose(spread.shift[:, k], x @ mean, rtol=1e-8)
        # The predictive variance: (x'Sx + 1) b / (a - 1).
        assert state.settings["noise_variance"][k] == pytest.approx(b / (a - 1), rel=1e-8)
        want = np.einsum("np,pq,nq->n", x, cov, x) * b / (a - 1)
        np.testing.assert_allclose(spread.variance[:, k], want, rtol=1e-8)


def test_variances_are_those_of_sampled_predictions() -> None:
    head, rows = targets(12)
    state = fit(rows, head)
    spread = student.spread(state, rows.phi, rows.z)
    x, mean, cov, a, b = exact(state, rows, 0)
    rng = np.random.default_rng(0)
    precision = rng.gamma(a, 1 / b, 200_000)
    w = (
        mean
        + rng.normal(size=(200_000, len(mean)))
        @ np.linalg.cholesky(cov).T
        / np.sqrt(precision)[:, None]
    )
    y = w @ x[0] + rng.normal(size=200_000) / np.sqrt(precision)
    total = spread.variance[0, 0] + state.settings["noise_variance"][0]
    assert y.var() == pytest.approx(total, rel=0.02)
    assert y.mean() == pytest.approx(spread.shift[0, 0], abs=0.02)


def test_the_bound_of_a_dense_fit_is_the_log_evidence() -> None:
    head, rows = targets(40)
    state = fit(rows, head)
    total = 0.0
    for k in range(2):
        x = exact(state, rows, k)[0]
        r = (rows.y - rows.z)[:, k]
        prior = state.settings["prior_scale"][k] / x.shape[1]
        rate = student.RATE * (r**2).mean()
        shape = (np.eye(len(x)) + prior * x @ x.T) * rate / student.SHAPE
        total += multivariate_t.logpdf(r, np.zeros(len(x)), shape, df=2 * student.SHAPE)
    assert state.settings["elbo"] * len(rows) == pytest.approx(total, rel=1e-9)


def test_many_rows_are_the_gaussian_regression() -> None:
    head, rows = targets(5000)
    a = student.spread(fit(rows, head), rows.phi, rows.z)
    gaussian = registry.fit("vbll", head, "regression", of(rows), {})
    b = registry.page("vbll").spread(gaussian, rows.phi, rows.z)
    np.testing.assert_allclose(a.shift, b.shift, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(a.variance, b.variance, rtol=5e-3)


def test_the_papers_package_agrees_on_one_output() -> None:
    head, rows = targets(60, k=1)
    state = fit(rows, head, covariance="diagonal")
    t, s = state.tensors, state.settings
    x, _, _, a, b = exact(state, rows, 0)
    r = rows.y - rows.z
    torch.manual_seed(0)
    package = tRegression(x.shape[1], 1, 1 / len(x), "diagonal").double()
    package.prior_scale = s["prior_scale"][0] / x.shape[1]
    package.prior_dof = torch.tensor([student.SHAPE], dtype=torch.float64)
    package.prior_rate = torch.tensor([student.RATE * float((r**2).mean())], dtype=torch.float64)
    with torch.no_grad():
        package.W_mean.copy_(torch.tensor(t["mean"]))
        # In noise variances, as the package has them.
        package.W_logdiag.copy_(torch.tensor(0.5 * np.log(t["variance"] * (a - 1) / b)))
        package.noise_log_dof.fill_(np.log(a))
        package.noise_log_rate.fill_(np.log(b))
    loss = package(torch.tensor(x)).train_loss_fn(torch.tensor(r))
    loss.backward()
    # The package leaves out log(2 pi) / 2 and the constant of the divergence.
    constant = 0.5 * x.shape[1] / len(x) - 0.5 * np.log(2 * np.pi)
    assert s["elbo"] == pytest.approx(constant - float(loss.detach()), rel=1e-6)
    names = ("W_mean", "W_logdiag", "noise_log_dof", "noise_log_rate")
    for name in names:
        assert np.abs(getattr(package, name).grad.numpy()).max() < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_learned_prior_tops_the_bound(kind: str) -> None:
    head, rows = targets(50, k=1)
    best = fit(rows, head, covariance=kind).settings
    scale = best["prior_scale"][0]
    for factor in (0.8, 1.25):
        other = fit(rows, head, covariance=kind, prior_scale=scale * factor).settings
        assert other["elbo"] < best["elbo"]


def test_no_prior_variance_is_the_frozen_head() -> None:
    head, rows = targets()
    for kind in KINDS:
        state = fit(rows, head, covariance=kind, prior_scale=1e-12)
        spread = student.spread(state, rows.phi, rows.z)
        assert np.abs(spread.shift).max() < 1e-6 and spread.variance.max() < 1e-7
