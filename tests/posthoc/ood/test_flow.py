"""The flow: its formulas as slow loops, its gradient by differences, densities that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.stats import spearmanr

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
    """Rows whose directions lie around a parabola, which no Gaussian describes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * 0.03
    x[:, 0] = rng.uniform(-0.5, 0.5, n)
    x[:, 1] += 2 * x[:, 0] ** 2
    x[:, 2] += 3
    return x * rng.uniform(1, 9, (n, 1))


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


def test_a_trained_density_integrates_to_one_and_knows_a_bend() -> None:
    def parabola(n: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        a = rng.uniform(-1.5, 1.5, n)
        return np.stack([a, a * a - 0.75 + 0.2 * rng.normal(size=n)], 1)

    x, held = (parabola(n, i).astype(np.float32) for i, n in enumerate((3000, 800)))
    layers, steps, value = coupling.train(x, held, Recipe())
    assert steps > 0 and value < coupling.loss(coupling.start(2, Recipe()), held) - 0.5
    wide = [p.astype(np.float64) for p in layers]

    def density(b: float, a: float) -> float:
        out, log = coupling.forward(wide, np.asarray([[a, b]]))
        return float(np.exp(log[0] - 0.5 * (out * out).sum()) / (2 * np.pi))

    total, _ = dblquad(density, -6, 6, -6, 8, epsabs=1e-3, epsrel=1e-3)
    assert total == pytest.approx(1.0, abs=0.01)


def test_a_flow_of_a_gaussian_stays_near_it() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 5)).astype(np.float32)
    layers, _, value = coupling.train(x[1000:], x[:1000], Recipe())
    assert value <= coupling.loss(coupling.start(5, Recipe()), x[:1000])
    out, log = coupling.forward(layers, x[:1000])
    got = 0.5 * (out * out).sum(1) - log
    assert spearmanr(0.5 * (x[:1000] ** 2).sum(1), got)[0] > 0.97


def test_a_score_is_the_flow_and_a_gaussian_of_the_rest() -> None:
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(500, 40)) @ rng.normal(size=(40, 40)) + 2
    state, t = fitted(phi), fitted(phi).tensors
    kept = state.settings["directions"]
    assert kept == flow.DIRECTIONS
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    away = unit - t["mean"]
    values = np.linalg.eigvalsh(np.cov(unit.T, bias=True))[::-1]
    layers = [t[f"layer{i}"] for i in range(6 * flow.RECIPE.layers)]
    got = flow.score(state, phi[:20], phi[:20])
    for row, value in zip(away, got, strict=False):
        along = t["basis"].T @ row
        out, log = coupling.forward(layers, (along / np.sqrt(values[:kept]))[None])
        rest = row @ row - along @ along
        want = 0.5 * (out @ out.T).item() - log[0] + 0.5 * rest / values[kept:].mean()
        assert value == pytest.approx(want, rel=1e-4)


def test_strange_directions_are_told_and_lengths_are_not() -> None:
    state = fitted(bent(3000, 0))
    strange = bent(500, 2)
    strange[:, 1] *= -1  # inside the ellipse, off the parabola
    z = np.zeros((500, 2))
    inside, outside = (flow.score(state, x, z) for x in (bent(500, 1), strange))
    assert auroc(inside, outside) > 0.85  # around the vertex both are the same
    np.testing.assert_allclose(flow.score(state, bent(500, 1) * 5, z), inside, rtol=1e-9)
    off = np.eye(6)[3] * 0.4 + bent(500, 1)
    assert auroc(inside, flow.score(state, off, z)) > 0.8
    assert np.isfinite(flow.score(state, 0 * off, z)).all()


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


def test_too_few_or_constant_rows_are_refused_and_one_direction_is_taken() -> None:
    with pytest.raises(FitError, match="flow needs at least 20 rows and has 19"):
        fitted(bent(19, 0))
    lengths = np.arange(1.0, 51)[:, None]
    with pytest.raises(FitError, match="flow: the direction of the features is constant"):
        fitted(np.asarray([[7.3, 1.1, 2.0]]) * lengths)
    angle = np.random.default_rng(0).normal(size=200) * 0.1
    phi = np.stack([np.cos(angle), np.sin(angle)], 1)
    near, far = flow.score(fitted(phi), np.asarray([[3.0, 0.0], [0.0, 3.0]]), np.zeros((2, 2)))
    assert far > near + 5
