"""The discriminative layer: gradients, the closed forms, the package of the paper, limits."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from vbll.layers.classification import DiscClassification

from posthoc import registry
from posthoc.contract import Features, FitError, State
from posthoc.folds import log_softmax
from posthoc.methods.vbll import discriminative, layer
from posthoc.methods.vbll.bound import Bound
from posthoc.methods.vbll.coordinates import with_one
from posthoc.methods.vbll.covariance import Diagonal
from posthoc.rows import of, take
from tests.posthoc.methods.vbll.material import classes, mean_nll

KINDS = ["diagonal", "lowrank", "dense"]


def fit(rows: Features, head, **settings) -> State:
    return registry.fit("vbll", head, "classification", of(rows, 150), settings)


@pytest.mark.parametrize("bound", ["tilted", "jensen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_gradient_of_the_bound(bound: Bound, kind: str) -> None:
    _, rows = classes(60)
    settings = layer.Settings(covariance=kind, objective="de_elbo", prior_scale=0.5)
    q, _ = discriminative.start(of(rows), settings)
    q.emphasis = 1.7
    mean = 0.2 * np.random.default_rng(0).normal(size=q.mean.shape)

    def value(flat: np.ndarray) -> float:
        q.mean = flat.reshape(mean.shape)
        return q.elbo(of(rows), bound)

    def gradient(flat: np.ndarray) -> np.ndarray:
        q.mean = flat.reshape(mean.shape)
        return discriminative.step(q, rows, 1.0, bound).ravel()

    assert check_grad(value, gradient, mean.ravel()) < 1e-5


def test_the_closed_form_covariance_tops_the_bound() -> None:
    # Settled until it stands still, no other diagonal at the same means and prior is better.
    _, rows = classes(120)
    q, _ = discriminative.start(of(rows), layer.Settings())
    for _ in range(80):
        discriminative.step(q, rows, 1.0, "jensen")
        q.covariance.settle()
        q.covariance.update(q.prior, q.emphasis)
    assert isinstance(q.covariance, Diagonal)
    best, at = q.elbo(of(rows), "jensen"), q.covariance.variance
    rng = np.random.default_rng(1)
    for _ in range(20):
        q.covariance.variance = at * np.exp(0.02 * rng.normal(size=at.shape))
        assert q.elbo(of(rows), "jensen") < best


@pytest.mark.parametrize("bound", ["tilted", "jensen"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_raises_the_bound_from_the_start(bound: Bound, kind: str) -> None:
    head, rows = classes()
    settings = layer.Settings(covariance=kind, bound=bound, epochs=40)
    q, _ = discriminative.start(of(rows), settings)
    before = q.elbo(of(rows), bound)
    state = fit(rows, head, covariance=kind, bound=bound, epochs=40)
    assert state.settings["elbo"] > before + 0.02


def test_richer_covariances_have_higher_bounds() -> None:
    head, rows = classes()
    diagonal, low, dense = (fit(rows, head, covariance=k).settings["elbo"] for k in KINDS)
    assert diagonal < low < dense


def test_the_bound_is_that_of_the_papers_package() -> None:
    head, rows = classes(80)
    blind = Features(rows.phi, np.zeros_like(rows.z), rows.y)
    state = fit(blind, head, bound="jensen", epochs=30)
    t, s = state.tensors, state.settings
    loss, package = package_loss(state, blind)
    # The package leaves out the constant -1/2 of each weight's divergence; its noise is next to
    # nothing here, which leaves a known Wishart term.
    constant = 0.5 * t["mean"].size / len(blind)
    assert -loss + constant == pytest.approx(s["elbo"], abs=1e-5)
    # Our closed-form covariance is where the package's gradient ends.
    gradient = package.W_logdiag.grad.numpy() * len(blind)
    assert np.abs(gradient).max() < 0.05


def package_loss(state: State, rows: Features) -> tuple[float, DiscClassification]:
    t, s = state.tensors, state.settings
    x = with_one((rows.phi - t["centre"]) * t["inverse"])
    torch.manual_seed(0)
    package = DiscClassification(x.shape[1], len(t["mean"]), 1 / len(x), "diagonal").double()
    package.prior_scale = s["prior_scale"] / x.shape[1]
    package.wishart_scale, package.dof = 0.0, 0.0
    with torch.no_grad():
        package.W_mean.copy_(torch.tensor(t["mean"]))
        package.W_logdiag.copy_(torch.tensor(0.5 * np.log(t["variance"])))
        package.noise_logdiag.fill_(-10.0)
    loss = package(torch.tensor(x)).train_loss_fn(torch.tensor(rows.y))
    loss.backward()
    return float(loss.detach()), package


def test_the_learned_prior_is_the_best_of_its_neighbours() -> None:
    head, rows = classes(1000)
    learned = fit(rows, head)
    scale = learned.settings["prior_scale"]
    for factor in (0.5, 2.0):
        fixed = fit(rows, head, prior_scale=scale * factor)
        assert fixed.settings["elbo"] < learned.settings["elbo"]
    far = fit(rows, head, prior_scale=scale * 1e3).settings["elbo"]
    assert far < learned.settings["elbo"] - 0.01


def test_no_prior_variance_is_the_frozen_head() -> None:
    head, rows = classes()
    spread = layer.spread(fit(rows, head, prior_scale=1e-12), rows.phi, rows.z)
    assert spread.shift is not None and np.abs(spread.shift).max() < 1e-6
    assert spread.variance is not None and spread.variance.max() < 1e-9


def test_rows_that_the_head_explains_leave_it_alone() -> None:
    head, rows = classes(2000)
    y = (rows.z + np.random.default_rng(5).gumbel(size=rows.z.shape)).argmax(1)
    state = fit(Features(rows.phi, rows.z, y), head)
    shift = layer.spread(state, rows.phi, rows.z).shift
    assert np.sqrt((shift**2).mean()) < 0.1


@pytest.mark.parametrize("objective", ["elbo", "de_elbo"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_predicts_moved_labels_better_than_the_frozen_head(kind: str, objective: str) -> None:
    head, all_rows = classes(1400)
    rows, fresh = take(all_rows, slice(0, 400)), take(all_rows, slice(400, None))
    state = fit(rows, head, covariance=kind, objective=objective)
    moved = fresh.z + layer.spread(state, fresh.phi, fresh.z).shift
    assert mean_nll(moved, fresh.y) < mean_nll(fresh.z, fresh.y) - 0.1


def test_means_are_near_the_exact_posterior_mode() -> None:
    # With so many rows the posterior is narrow and its mean the penalised maximum likelihood.
    head, rows = classes(4000, d=3)
    state = fit(rows, head, prior_scale=4.0, epochs=30)
    x = with_one((rows.phi - state.tensors["centre"]) * state.tensors["inverse"])
    weight = np.zeros_like(state.tensors["mean"])
    for _ in range(400):  # the bound 1/2 of the curvature: monotone
        p = np.exp(log_softmax(rows.z + x @ weight.T))
        gradient = (np.eye(3)[rows.y] - p).T @ x - weight
        weight = weight + gradient @ np.linalg.inv(0.5 * x.T @ x + np.eye(4))
    np.testing.assert_allclose(state.tensors["mean"], weight - weight.mean(0), atol=0.02)


def test_classes_without_rows_are_counted() -> None:
    head, rows = classes()
    state = fit(take(rows, rows.y != 2), head)
    assert state.settings["classes_without_rows"] == 1
    shift = layer.spread(state, rows.phi, rows.z).shift
    assert shift[:, 2].mean() < -0.5


def test_dense_beyond_the_limit_is_refused() -> None:
    rng = np.random.default_rng(0)
    head, _ = classes(4)
    wide = Features(rng.normal(size=(2, 4095)), rng.normal(size=(2, 3)), np.asarray([0, 1]))
    with pytest.raises(FitError, match="above the limit"):
        fit(wide, head, covariance="dense")


def test_memory_at_a_thousand_classes_and_2048_features() -> None:
    rng = np.random.default_rng(0)
    c, d, n = 1000, 2048, 64
    rows = Features(
        rng.normal(size=(n, d)).astype(np.float32),
        rng.normal(size=(n, c)).astype(np.float32),
        rng.integers(0, c, n),
    )
    tracemalloc.start()
    state = discriminative.fit(of(rows), layer.Settings(epochs=1))
    layer.spread(state, rows.phi, rows.z)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6
    assert state.tensors["variance"].shape == (c, d + 1)
