"""The cap of a vector: gradients by differences, noise that is known, caution, and its graph."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from calibration.head import Head, reference
from calibration.scaling import fit_regression
from posthoc import registry
from posthoc.contract import Features, FitError, State
from posthoc.graph import Fragment, standalone
from posthoc.methods.bayescap import generalised_gaussian as gg
from posthoc.methods.bayescap import image, vector
from posthoc.methods.bayescap import parameters as cap
from posthoc.rows import of, take
from posthoc.runtime import open_session

D = 4


def rows(n: int = 3000, seed: int = 0, features: bool = True) -> Features:
    """Two outputs in units far apart, normal and Laplace noise that grows along a feature (which
    is the first output too)."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D))
    z = phi[:, :2] * [1.0, 1000.0]
    noise = np.stack([rng.normal(size=n), rng.laplace(size=n)], 1)
    y = z + noise * np.exp(0.6 * phi[:, :1]) * [0.1, 200.0]
    return Features(phi if features else None, z, y)


def truth(fresh: Features) -> tuple[np.ndarray, np.ndarray]:
    assert fresh.z is not None
    scale = np.exp(0.6 * fresh.z[:, :1]) * [0.1 * np.sqrt(2), 200.0]
    return scale, np.broadcast_to([2.0, 1.0], scale.shape)


def fit(given: Features, **settings: object) -> State:
    return registry.fit("bayescap", None, "regression", of(given), settings)


def error(given: Features) -> np.ndarray:
    return np.asarray(given.y) - given.z


def test_the_gradient_is_that_of_torch_and_of_differences() -> None:
    rng = np.random.default_rng(0)
    start = np.asarray([0.3, -0.2, 0.5, -0.4])
    raw, log_r = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
    log_r[0] = 6.0, -40.0  # on the tangent, and below what a power counts
    value, gradient = cap.objective(start)(raw, log_r)
    found = np.zeros_like(raw)
    for i in np.ndindex(raw.shape):
        up, down = raw.copy(), raw.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        found[i] = cap.objective(start)(up, log_r)[0] - cap.objective(start)(down, log_r)[0]
    np.testing.assert_allclose(gradient, found / 2e-6, atol=1e-7)
    leaf = torch.tensor(raw, requires_grad=True)
    x = leaf + torch.tensor(start)
    log_beta = cap.MIDDLE + cap.HALF * torch.tanh(x[:, 2:] / 2)
    loss = image.likelihood(torch.tensor(log_r), x[:, :2], log_beta).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert leaf.grad is not None
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-12)


def test_a_beta_becomes_b_and_comes_back() -> None:
    beta = np.linspace(*cap.INNER, 50)
    np.testing.assert_allclose(np.exp(cap.log_beta(cap.to_b(beta))), beta, rtol=1e-10)
    assert np.exp(cap.log_beta(np.asarray([-80.0, 80.0]))) == pytest.approx(cap.BETA)


def test_the_polynomial_is_the_log_gamma() -> None:
    u = np.linspace(*np.log(cap.BETA), 4001)
    g = Fragment(13)
    g.op("Identity", cap.emit_log_variance_factor(g, g.input("u", "float32", ["N"])), out="factor")
    session = open_session(standalone(g, {"factor": ("float32", (-1,))}))
    (got,) = session.run(["factor"], {"u": u.astype(np.float32)})
    want = gg.log_variance_factor(np.exp(u.astype(np.float32).astype(np.float64)))
    np.testing.assert_allclose(got, want, atol=3e-6)
    t = (u - cap.MIDDLE) / cap.HALF
    exact = np.polynomial.polynomial.polyval(t, cap._polynomial())
    np.testing.assert_allclose(exact, gg.log_variance_factor(np.exp(u)), atol=1e-7)


@pytest.mark.parametrize(("noise", "beta", "variance"), [("normal", 2, 1), ("laplace", 1, 2)])
def test_it_recovers_noise_that_depends_on_nothing(
    noise: str, beta: float, variance: float
) -> None:
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(20_000, 1))
        given = Features(None, z, z + getattr(rng, noise)(size=z.shape))
        a, b = vector.parameters(fit(given, steps=400), None, z)
        found.append((abs(b.mean() / beta - 1), abs(gg.variance(a, b).mean() / variance - 1)))
    assert median(b for b, _ in found) < 0.05
    assert median(v for _, v in found) < 0.05


@pytest.mark.parametrize("features", [True, False])
def test_it_finds_the_noise_of_each_row_and_output(features: bool) -> None:
    state, fresh = fit(rows(features=features)), rows(2000, 1, features)
    assert state.settings["features"] is features
    a, b = vector.parameters(state, fresh.phi, fresh.z)
    want = truth(fresh)
    for k in range(2):
        assert spearmanr(a[:, k], want[0][:, k]).statistic > 0.9
    assert np.median(b[:, 0]) > 1.5 > np.median(b[:, 1])
    constant = gg.nll(error(fresh), *gg.fit(error(rows()))).mean()
    best = gg.nll(error(fresh), *want).mean()
    assert gg.nll(error(fresh), a, b).mean() < constant - 0.8 * (constant - best)
    inside = np.abs(error(fresh)) <= gg.quantile(0.95, a, b)
    np.testing.assert_allclose(inside.mean(0), 0.9, atol=0.03)


def test_the_mean_is_the_frozen_one_and_the_std_follows_the_row() -> None:
    given, calibration, fresh = rows(), rows(1000, 1), rows(1000, 2)
    state = fit(given)
    found = vector.spread(state, fresh.phi, fresh.z)
    assert found.shift is None and not found.decomposes
    noise = np.asarray(state.settings["noise_variance"])
    np.testing.assert_allclose(noise, (error(given) ** 2).mean(0))
    for k in range(2):  # one output at a time: the head has one strength
        one = slice(k, k + 1)
        v = vector.spread(state, calibration.phi, calibration.z)
        scaling = fit_regression(
            error(calibration)[:, one], noise[one], type(v)(np.asarray(v.variance)[:, one])
        )
        assert scaling.nll < scaling.nll_alone - 0.1
    head = Head("regression", 2, D, ("bayescap", state), noise=noise, strength=3.0)
    out = reference(head, fresh.phi, fresh.z)
    np.testing.assert_array_equal(out["mean"], fresh.z)
    np.testing.assert_allclose(out["std"] ** 2, noise + 3.0 * np.asarray(found.variance))


def test_noise_without_a_pattern_stays_the_homoscedastic_distribution() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(600, 1))
    given = Features(rng.normal(size=(600, 3)), z, z + rng.laplace(size=z.shape))
    state = fit(given)
    said = state.settings
    assert said["held_out_nll"][0] <= said["held_out_nll_homoscedastic"][0]
    a, b = vector.parameters(state, given.phi, given.z)
    assert np.log(a).std() < 0.3
    if said["gate"] == [0.0]:
        assert np.ptp(a) == np.ptp(b) == 0.0


def test_a_share_of_none_is_the_homoscedastic_distribution() -> None:
    log_r = gg.log_size(np.random.default_rng(0).normal(size=(500, 2)))
    start = cap.constants(np.exp(log_r))
    bad = np.random.default_rng(1).normal(size=(500, 4)) * 3  # a network that says nothing
    found = cap.recalibrate(bad, log_r, start)
    assert (found.gate == 0).all() and (found.log_scale == 0).all()
    np.testing.assert_array_equal(found.nll, found.nll_constant)
    good = np.concatenate([log_r - log_r.mean(0), np.zeros((500, 2))], 1)  # one that knows
    found = cap.recalibrate(good, log_r, start)
    assert (found.gate > 0).all() and (found.nll < found.nll_constant).all()


def test_one_wrong_label_does_not_lead_the_network() -> None:
    given, fresh = rows(), rows(1000, 1)
    assert given.y is not None
    spoilt = np.asarray(given.y).copy()
    spoilt[[7, 1004]] += [500.0, 5e5]  # thousands of standard deviations: one trains, one stops
    a, b = vector.parameters(fit(Features(given.phi, given.z, spoilt)), fresh.phi, fresh.z)
    clean = vector.parameters(fit(given), fresh.phi, fresh.z)
    spoilt_nll, clean_nll = (gg.nll(error(fresh), *p).mean() for p in ((a, b), clean))
    assert spoilt_nll < clean_nll + 0.1


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_rows_that_a_model_has_exactly_right(share: float) -> None:
    given = rows(1000)
    exact = np.random.default_rng(0).uniform(size=(1000, 1)) < share
    half = Features(given.phi, given.z, np.where(exact, given.z, given.y))
    std = np.sqrt(np.asarray(vector.spread(fit(half), given.phi, given.z).variance))
    size = np.sqrt((error(half) ** 2).mean(0))
    assert (std > 1e-5 * size).all() and (std < 100 * size).all()


def test_out_of_range_it_is_no_surer_than_the_homoscedastic_distribution() -> None:
    state, fresh = fit(rows()), rows(500, 1)
    far = np.asarray(fresh.phi).copy()
    far[:, 3] = 60.0  # a feature that says nothing
    constants = state.tensors["constants"]
    a, b = vector.parameters(state, fresh.phi, fresh.z)
    assert (a < np.exp(constants[:2]) * 0.7).any(0).all()
    a, b = vector.parameters(state, far, fresh.z)
    assert (a >= np.exp(constants[:2]) * (1 - 1e-12)).all()
    assert (b <= np.exp(cap.log_beta(constants[2:])) * (1 + 1e-12)).all()
    huge = vector.spread(state, np.asarray(fresh.phi) * 1e6, fresh.z).variance
    assert huge is not None and np.isfinite(huge).all()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("features", [True, False])
def test_the_graph_is_the_definition(features: bool, layers: int) -> None:
    state, fresh = fit(rows(400, 0, features), layers=layers, width=16), rows(300, 3, features)
    g = Fragment(13)
    phi = g.input("phi", "float32", ["N", D]) if features else None
    names = vector.emit(g, state, phi, g.input("z", "float32", ["N", 2]))
    assert names.variance is not None
    g.op("Identity", names.variance, out="variance")
    session = open_session(standalone(g, {"variance": ("float32", (-1, 2))}))
    feed = {"z": fresh.z.astype(np.float32)}
    feed["z"][:50] *= 5  # beyond R
    if features:
        feed["phi"] = np.asarray(fresh.phi, np.float32)
    (got,) = session.run(["variance"], feed)
    want = vector.spread(state, feed.get("phi"), feed["z"]).variance
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_the_variance_is_that_of_the_parameters() -> None:
    state, fresh = fit(rows(500)), rows(100, 1)
    want = gg.variance(*vector.parameters(state, fresh.phi, fresh.z))
    np.testing.assert_array_equal(vector.spread(state, fresh.phi, fresh.z).variance, want)


def test_what_features_may_say() -> None:
    given = rows(200)
    assert fit(given, features="auto").settings["features"] is True
    assert fit(given, features="false").settings["features"] is False
    blind = Features(None, given.z, given.y)
    assert fit(blind).settings["features"] is False
    with pytest.raises(FitError, match="black box"):
        fit(blind, features=True)


def test_unusable_rows_are_named() -> None:
    given = rows(100)
    with pytest.raises(FitError, match="at least 20 rows and has 19"):
        fit(take(given, slice(0, 19)))
    with pytest.raises(FitError, match="without error"):
        fit(Features(given.phi, given.z, given.z))
    assert given.phi is not None
    given.phi[0, 0] = np.nan
    with pytest.raises(FitError, match="features that are not finite"):
        fit(given)
    assert np.isfinite(vector.parameters(fit(given, features=False), None, given.z)[0]).all()
