"""The flow: its formulas as slow loops, its gradient by differences, densities that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.stats import multivariate_normal, spearmanr

from calibration.metrics.ranking import auroc
from posthoc.contract import Features, FitError, State
from posthoc.ood import coupling, flow
from posthoc.ood.coupling import PARTS, Recipe
from posthoc.rows import take

SMALL = Recipe(layers=3, width=5)


def drawn(size: int, seed: int = 0) -> list[np.ndarray]:
    """Parameters as training may leave them."""
    rng = np.random.default_rng(seed)
    masks = coupling._masks(size, SMALL)
    start = coupling.start(size, SMALL)
    return [(p + 0.5 * rng.normal(size=p.shape)) * m for p, m in zip(start, masks, strict=True)]


def bent(n: int, seed: int, d: int = 6) -> np.ndarray:
    """Rows around a parabola, which no Gaussian describes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * 0.3
    x[:, 0] = rng.uniform(-3, 3, n)
    x[:, 1] += x[:, 0] ** 2 - 3
    return x


def fitted(phi: np.ndarray) -> State:
    rows = Features(phi, np.zeros((len(phi), 2)))
    return flow.finish(flow.update(flow.init(2, phi.shape[1]), rows))


def test_the_layers_are_their_definition_and_sum_s_is_the_log_of_the_jacobian() -> None:
    parameters, x = drawn(4), np.random.default_rng(1).normal(size=(6, 4))
    out, log = coupling.forward(parameters, x)
    for row, got, size in zip(x, out, log, strict=True):
        value = row.copy()
        for i in range(0, len(parameters), PARTS):
            a, a0, s, s0, t, t0 = parameters[i : i + PARTS]
            read = [j for j in range(4) if j % 2 == (i // PARTS) % 2]
            h = [np.tanh(sum(value[j] * a[j, k] for j in read) + a0[k]) for k in range(5)]
            new = value.copy()
            for j in set(range(4)) - set(read):
                scale = np.tanh(sum(h[k] * s[k, j] for k in range(5)) + s0[j])
                move = sum(h[k] * t[k, j] for k in range(5)) + t0[j]
                new[j] = value[j] * np.exp(scale) + move
            value = new
        np.testing.assert_allclose(got, value, rtol=1e-12)
        step = 1e-6 * np.eye(4)
        jacobian = [
            coupling.forward(parameters, (row + e)[None])[0][0]
            - coupling.forward(parameters, (row - e)[None])[0][0]
            for e in step
        ]
        assert np.linalg.slogdet(np.asarray(jacobian) / 2e-6)[1] == pytest.approx(size, abs=1e-6)


def test_the_gradient_is_that_of_differences() -> None:
    parameters, x = drawn(5), np.random.default_rng(2).normal(size=(7, 5))
    masks = coupling._masks(5, SMALL)
    for i, gradient in enumerate(coupling.gradients(parameters, x)):
        for place in np.ndindex(parameters[i].shape):
            if not np.broadcast_to(masks[i], gradient.shape)[place]:
                continue
            both = []
            for sign in (1, -1):
                moved = [p.copy() for p in parameters]
                moved[i][place] += sign * 1e-6
                both.append(coupling.loss(moved, x))
            assert gradient[place] == pytest.approx((both[0] - both[1]) / 2e-6, abs=1e-7)


def test_a_density_of_two_features_integrates_to_one() -> None:
    state = fitted(bent(3000, 0, d=2))
    scale = state.tensors["scale"].prod()

    def density(y: float, x: float) -> float:
        nats = flow.score(state, np.asarray([[x, y]]), np.zeros((1, 2)))[0]
        return float(np.exp(-nats) * scale / (2 * np.pi))

    total, _ = dblquad(density, -6, 6, -8, 12, epsabs=1e-3, epsrel=1e-3)
    assert total == pytest.approx(1.0, abs=0.01)


def test_a_gaussian_stays_one_and_a_bent_density_is_learnt() -> None:
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 6))
    fresh = rng.normal(size=(500, 6)) @ np.linalg.cholesky(np.cov(phi.T)).T
    want = -multivariate_normal(phi.mean(0), np.cov(phi.T)).logpdf(fresh)
    got = flow.score(fitted(phi), fresh, np.zeros((500, 2)))
    assert spearmanr(want, got)[0] > 0.97
    state = fitted(bent(4000, 0))
    assert state.settings["held_out_nats"] < 3 - 0.8  # nats; the Gaussian's is 6 / 2
    strange = bent(500, 2)
    strange[:, 1] -= strange[:, 0] ** 2 - 3  # inside the ellipse, off the parabola
    inside, outside = (flow.score(state, x, x[:, :2]) for x in (bent(500, 1), strange))
    assert auroc(inside, outside) > 0.9


def test_what_leaves_the_directions_of_the_rows_is_strange() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 40))

    def near(n: int, off: float) -> np.ndarray:
        return rng.normal(size=(n, 16)) @ mix + off * rng.normal(size=(n, 40))

    state = fitted(near(2000, 0.3))
    assert state.settings["directions"] == flow.DIRECTIONS and len(state.tensors["rest"]) == 3
    z = np.zeros((300, 2))
    inside, outside = (flow.score(state, near(300, off), z) for off in (0.3, 0.6))
    assert auroc(inside, outside) > 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fit_does_not_know_blocks_order_or_merging(seed: int) -> None:
    phi = bent(300, seed)
    rows = Features(phi, np.zeros((300, 2)))
    mixed = take(rows, np.random.default_rng(seed).permutation(300))
    a = flow.update(flow.init(2, 6), take(mixed, slice(100)))
    b = flow.update(flow.init(2, 6), take(mixed, slice(100, None)))
    whole, merged = fitted(phi), flow.finish(flow.merge(b, a))
    assert merged.settings == whole.settings
    for key, value in whole.tensors.items():
        np.testing.assert_array_equal(merged.tensors[key], value)


def test_too_few_or_constant_rows_are_refused_and_one_feature_is_taken() -> None:
    with pytest.raises(FitError, match="flow needs at least 20 rows and has 19"):
        fitted(bent(19, 0))
    with pytest.raises(FitError, match="flow: every feature is constant"):
        fitted(np.full((50, 3), 7.3))
    phi = bent(200, 0, d=2)[:, :1]
    found = flow.score(fitted(phi), np.asarray([[0.0], [9.0]]), np.zeros((2, 2)))
    assert found[1] > found[0] + 1
