"""The loss predictor: its objectives by loops and differences, its parts, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from calibration import scaling
from calibration.metrics.ranking import auroc
from posthoc import registry
from posthoc.contract import Features, FitError, State
from posthoc.folds import log_loss, log_softmax
from posthoc.graph import Fragment, standalone
from posthoc.links import entropy, log_probs
from posthoc.methods.loss import objective, perceptron, predictor, training
from posthoc.methods.loss.inputs import measure
from posthoc.rows import Rows, of, take
from posthoc.runtime import open_session

D, C, N = 6, 4, 1500


def classes(n: int = N, seed: int = 0, width: int = C) -> Features:
    """A classifier that is right about its noise but where the first feature is positive: there it
    is three times too sure."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D))
    true = phi[:, 1:] @ np.random.default_rng(5).normal(size=(D - 1, width))
    sure = np.where(phi[:, :1] > 0, 3.0, 1.0)
    return Features(phi, true * sure, (true + rng.gumbel(size=true.shape)).argmax(1))


def values(n: int = N, seed: int = 0) -> Features:
    """Two regressions with noise that grows along one feature each."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D))
    z = phi[:, :2] * 2.0
    return Features(phi, z, z + rng.normal(size=z.shape) * np.exp(phi[:, 2:4] * 0.6))


def fit(rows: Features, **given: object) -> State:
    task = "classification" if np.asarray(rows.y).ndim == 1 else "regression"
    return registry.fit("loss", None, task, of(rows), given)


def difference(f, x: np.ndarray, step: float = 1e-6) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The gradient of f at x by central differences."""
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        found[i] = (f(up) - f(down)) / (2 * step)
    return found


@given(st.integers(0, 2**31), st.integers(2, 7), st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_the_ranking_loss_is_a_loop_over_pairs(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    u, loss = rng.normal(size=(n, k)), np.round(rng.exponential(size=(n, k)), 1)
    total = weights = 0.0
    for j in range(k):
        for a in range(n):
            for b in range(n):
                w = min(abs(loss[a, j] - loss[b, j]), 1.0)
                sign = np.sign(loss[a, j] - loss[b, j])
                total += w * max(0.0, 0.3 - sign * (u[a, j] - u[b, j]))
                weights += w
    value, gradient = objective.ranking(u, loss, 0.3)
    assert value == pytest.approx(total / weights if weights else 0.0, abs=1e-12)
    want = difference(lambda v: objective.ranking(v, loss, 0.3)[0], u)
    np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_the_likelihoods_are_theirs() -> None:
    rng = np.random.default_rng(0)
    z, y, h = rng.normal(size=(8, C)) * 4, rng.integers(0, C, 8), rng.normal(size=(8, 1))
    value, gradient = objective.widened(h, z, y)
    assert value == pytest.approx(log_loss(z, y, temperature=np.exp(h[:, 0] / 2)).mean())
    want = difference(lambda v: objective.widened(v, z, y)[0], h)
    np.testing.assert_allclose(gradient, want, atol=1e-8)
    error, h = rng.normal(size=(8, 2)), rng.normal(size=(8, 2))
    value, gradient = objective.gaussian(h, error**2)
    nll = scaling.student_nll(error, np.exp(h), np.inf).mean()
    assert value == pytest.approx(nll - 0.5 * np.log(2 * np.pi))
    want = difference(lambda v: objective.gaussian(v, error**2)[0], h)
    np.testing.assert_allclose(gradient, want, atol=1e-8)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_gradient_of_the_network_is_that_of_torch_and_of_differences(layers: int) -> None:
    rng = np.random.default_rng(0)
    sizes = (5, *(7,) * layers, 2)
    parameters = [
        np.asarray(p, np.float64) + 0.1 * rng.normal(size=p.shape)
        for p in perceptron.start(sizes, rng)
    ]
    x, weight = rng.normal(size=(9, 5)), rng.normal(size=(9, 2))
    gradients = perceptron.backward(parameters, perceptron.forward(parameters, x), weight)
    leaves = [torch.tensor(p, requires_grad=True) for p in parameters]
    out = torch.tensor(x)
    for i in range(0, len(leaves), 2):
        out = (torch.relu(out) if i else out) @ leaves[i] + leaves[i + 1]
    (out * torch.tensor(weight)).sum().backward()
    for i, (gradient, leaf) in enumerate(zip(gradients, leaves, strict=True)):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-12)

        def value(p: np.ndarray, i: int = i) -> float:
            changed = [*parameters[:i], p, *parameters[i + 1 :]]
            return float((perceptron.forward(changed, x)[-1] * weight).sum())

        np.testing.assert_allclose(gradient, difference(value, parameters[i]), atol=1e-6)


def test_the_descent_is_torchs_adamw() -> None:
    rng = np.random.default_rng(0)
    ours = [rng.normal(size=(3, 2)), rng.normal(size=2)]
    theirs = [torch.tensor(p.copy()) for p in ours]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
    peer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    descent = perceptron.AdamW(ours, 0.01, 0.1)
    for _ in range(20):
        gradients = [rng.normal(size=p.shape) for p in ours]
        descent.step(gradients)
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = torch.tensor(gradient)
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-9)


def test_inputs_are_standardised_and_say_how_far_out_a_row_is() -> None:
    rows = classes()
    rows.phi[:, 4] = np.float32(0.1)  # whose mean over blocks is not quite itself
    pieces = [take(rows, slice(i, i + 41)) for i in range(0, N, 41)]
    inputs = measure(pieces, "classification", 3)
    x, away = inputs(rows.phi, rows.z)
    assert x.shape == (N, D + 2 + 1)
    moving = [i for i in range(x.shape[1]) if i != 4]
    np.testing.assert_allclose(x[:, moving].mean(0), 0, atol=0.02)  # but for what REACH cuts
    np.testing.assert_allclose(x[:, moving].std(0), 1, atol=0.05)
    assert not x[:, 4].any()
    top = np.sort(rows.z, 1)[:, ::-1]
    raw = np.concatenate(
        [top[:, 1:3] - top[:, :1], (top[:, 0] - np.logaddexp(top[:, 1], top[:, 2]))[:, None]], 1
    )
    np.testing.assert_allclose(x[:, -3:], (raw - raw.mean(0)) / raw.std(0), atol=1e-6)
    np.testing.assert_allclose(away[:, 0], np.abs(x).max(1))
    far, distance = inputs(rows.phi[:1] + 100.0, rows.z[:1])
    assert far.max() == 10.0 and distance > 50


@pytest.mark.parametrize("kind", ["ranking", "likelihood"])
def test_it_widens_where_the_classifier_is_too_sure(kind: str) -> None:
    state, rows, fresh = fit(classes(), objective=kind), classes(seed=1), classes(seed=2)
    assert state.settings["steps_taken"] > 0
    v = predictor.spread(state, fresh.phi, fresh.z).variance
    assert auroc(v[fresh.phi[:, 0] < -0.2], v[fresh.phi[:, 0] > 0.2]) > 0.95
    spread = predictor.spread(state, rows.phi, rows.z)
    found = scaling.fit_classification(rows.z, rows.y, spread)
    log_p = log_probs(
        fresh.z, predictor.spread(state, fresh.phi, fresh.z), found.temperature, found.strength
    )
    assert (log_p.argmax(1) == fresh.z.argmax(1)).all()
    nll = -log_p[np.arange(N), fresh.y].mean()
    alone = scaling.mean_nll(fresh.z / found.temperature_alone, fresh.y)
    assert nll < alone - 0.03  # the frozen model without its fault is 0.08 below


def test_the_ranking_says_where_losses_are_larger_than_expected() -> None:
    rows = classes()
    found = fit(rows).settings["held_out_rank_correlation"]
    held = take(rows, np.arange(N) % 5 == 4)
    log_p = log_softmax(held.z)
    excess = log_loss(held.z, held.y) - entropy(log_p)
    assert found > max(spearmanr(-log_p.max(1), excess).statistic, 0.2)


@pytest.mark.parametrize("kind", ["ranking", "likelihood"])
def test_it_finds_the_noise_of_each_output(kind: str) -> None:
    rows, fresh = values(3000), values(seed=1)
    state = fit(rows, objective=kind)
    v = predictor.spread(state, fresh.phi, fresh.z).variance
    want = np.exp(2 * 0.6 * fresh.phi[:, 2:4])
    for k in range(2):
        assert spearmanr(v[:, k], want[:, k]).statistic > 0.85
    error = fresh.y - fresh.z
    noise = np.asarray(state.settings["noise_variance"])
    np.testing.assert_allclose(noise, ((rows.y - rows.z) ** 2).mean(0))
    nll = scaling.student_nll(error, v, np.inf).mean()
    known = scaling.student_nll(error, want, np.inf).mean()
    constant = scaling.student_nll(error, np.broadcast_to(noise, v.shape), np.inf).mean()
    assert nll < constant - 0.6 * (constant - known)


def test_a_row_out_of_range_is_not_called_surer_than_the_average() -> None:
    rows = values(3000)
    state = fit(rows)
    fresh = values(seed=1)
    unit = state.tensors["unit"]
    far = fresh.phi.copy()
    far[:, 5] = 60.0  # a feature that says nothing
    low = predictor.spread(state, fresh.phi, fresh.z).variance.min(0)
    assert (low < 0.5 * unit).all()
    assert (predictor.spread(state, far, fresh.z).variance >= unit * (1 - 1e-12)).all()
    huge = predictor.spread(state, fresh.phi * 1e6, fresh.z).variance
    assert np.isfinite(huge).all()
    assert (huge <= unit * np.exp(np.maximum(state.tensors["high"], 0)) * (1 + 1e-12)).all()


def test_losses_without_a_pattern_leave_the_model_alone() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(N, C))
    rows = Features(rng.normal(size=(N, D)), z, (z + rng.gumbel(size=z.shape)).argmax(1))
    v = predictor.spread(fit(rows), rows.phi, rows.z).variance
    assert np.log(v).std() < 0.35
    found = scaling.fit_classification(z, rows.y, predictor.spread(fit(rows), rows.phi, z))
    assert found.nll <= found.nll_alone + scaling.FLAT


@pytest.mark.parametrize("width", [2, 4, 30])
@pytest.mark.parametrize("features", [True, False])
def test_the_graph_is_the_definition(width: int, features: bool) -> None:
    rows = classes(400, width=width)
    rows = Features(rows.phi if features else None, rows.z, rows.y)
    state = fit(rows, layers=2, width=16)
    g = Fragment(13)
    phi = g.input("phi", "float32", ["N", D]) if features else None
    z = g.input("z", "float32", ["N", width])
    names = predictor.emit(g, state, phi, z)
    g.op("Identity", names.variance, out="variance")
    session = open_session(standalone(g, {"variance": ("float32", (-1, 1))}))
    fresh = classes(300, seed=3, width=width)
    fresh.phi[:50] *= 8  # beyond R
    feed = {"z": fresh.z.astype(np.float32)} | (
        {"phi": fresh.phi.astype(np.float32)} if features else {}
    )
    (got,) = session.run(["variance"], feed)
    want = predictor.spread(state, feed.get("phi"), feed["z"]).variance
    np.testing.assert_allclose(got[:, 0], want, rtol=2e-5)


def test_the_network_stops_at_its_best_look() -> None:
    rows = classes(300)
    short = fit(rows, steps=1)
    assert short.settings["steps_taken"] in (0, 1)
    eager = fit(rows, patience=1, learning_rate=0.5)
    assert eager.settings["steps_taken"] < 20


def test_the_map_keeps_the_order_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    column = rng.normal(size=(400, 1))
    squared = (rng.normal(size=400) * np.exp(column[:, 0])) ** 2

    def likelihood(h: np.ndarray) -> tuple[float, np.ndarray]:
        return objective.gaussian(h, squared)

    (a,), constant = training.fit_map(column, likelihood, signed=1)
    assert a == pytest.approx(2.0, abs=0.25) and constant == pytest.approx(0.0, abs=0.25)
    (a,), _ = training.fit_map(-column, likelihood, signed=1)
    assert a == 0.0
    (a,), _ = training.fit_map(-column, likelihood, signed=0)
    assert a == pytest.approx(-2.0, abs=0.25)


def test_blocks_of_one_size_however_rows_come() -> None:
    rows = classes(100)
    pieces = [take(rows, slice(i, j)) for i, j in ((0, 0), (0, 33), (33, 34), (34, 100))]
    cut = training.recut(Rows(lambda: iter(pieces), 100), 30)
    assert [len(b) for b in cut] == [30, 30, 30, 10]
    np.testing.assert_array_equal(np.concatenate([b.phi for b in cut]), rows.phi)


def test_unusable_rows_are_named() -> None:
    rows = classes(100)
    with pytest.raises(FitError, match="at least 20 rows and has 19"):
        fit(take(rows, slice(0, 19)))
    exact = values(100)
    with pytest.raises(FitError, match="without error"):
        fit(Features(exact.phi, exact.z, exact.z))
    rows.phi[0, 0] = np.nan
    with pytest.raises(FitError, match="features that are not finite"):
        fit(rows)


def test_a_widening_is_one_on_the_average_of_the_held_out_rows() -> None:
    rows = classes()
    v = predictor.spread(fit(rows), rows.phi, rows.z).variance
    held = np.arange(N) % 5 == 4
    assert v[held].mean() == pytest.approx(1.0, rel=0.02)  # but for rows beyond R


def test_a_map_from_few_rows_keeps_its_prior() -> None:
    column = np.tile([[-1.0], [1.0]], (4, 1))
    squared = np.exp(2.0 * column[:, 0])

    def likelihood(h: np.ndarray) -> tuple[float, np.ndarray]:
        return objective.gaussian(h, squared)

    (few,), _ = training.fit_map(column, likelihood, signed=1)

    def cost(a: float) -> float:  # by hand, with the best constant; a prior of precision 4 / 8
        h = a * column[:, 0]
        return likelihood(h + np.log((squared * np.exp(-h)).mean()))[0] + 0.5 * 4.0 / 8 * a**2

    grid = np.linspace(0, 3, 3001)
    assert few == pytest.approx(grid[np.argmin([cost(a) for a in grid])], abs=2e-3)
    assert few < 1.7
