"""The Student-t layer against dense algebra, sampling, scipy's densities and its dual form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as distributions

from calibration.scaling import student_nll
from posthoc import registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.methods import student_t
from posthoc.methods.student_t import Settings
from posthoc.rows import of, take

D, K, N = 5, 2, 80


def material(n: int = N, seed: int = 0) -> tuple[LinearHead, Features]:
    """A frozen head that is wrong by a linear map, and noise of another size in each output."""
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(K, D)), rng.normal(size=K))
    phi = rng.normal(size=(n, D)) * np.asarray([1.0, 2.0, 0.5, 1.0, 1.0]) + 0.3
    z = phi @ head.weight.T + head.bias
    wrong = 0.3 * np.random.default_rng(7).normal(size=(D, K))
    return head, Features(phi, z, z + phi @ wrong + rng.normal(size=z.shape) * [0.5, 2.0])


def fitted(rows: Features, head: LinearHead, **settings: float) -> State:
    return registry.fit("student_t", head, "regression", of(rows), settings)


def dense(rows: Features) -> tuple[np.ndarray, np.ndarray]:
    """(phi with ones, residuals)."""
    return np.concatenate([rows.phi, np.ones((len(rows), 1))], 1), rows.y - rows.z


def test_dense_algebra_gives_the_same_posterior() -> None:
    head, rows = material()
    _, fresh = material(seed=3)
    state = fitted(rows, head, prior_precision=1.7, a0=3.0, b0=0.8)
    phi, r = dense(rows)
    precision = 1.7 * np.eye(D + 1) + phi.T @ phi
    mean = np.linalg.solve(precision, phi.T @ r)
    a = 3.0 + N / 2
    b = 0.8 + 0.5 * ((r**2).sum(0) - np.einsum("kc,kj,jc->c", mean, precision, mean))
    new, _ = dense(fresh)
    v = np.einsum("ni,ij,nj->n", new, np.linalg.inv(precision), new)
    found = student_t.spread(state, fresh.phi, fresh.z)
    np.testing.assert_allclose(found.shift, new @ mean, rtol=1e-10)
    np.testing.assert_allclose(found.variance, v[:, None] * b / (a - 1), rtol=1e-10)
    np.testing.assert_allclose(state.settings["noise_variance"], b / (a - 1), rtol=1e-12)
    assert state.settings["df"] == 2 * a


def test_the_predictive_is_that_of_sampled_weights_and_noise() -> None:
    head, rows = material(n=12)
    state = fitted(rows, head, prior_precision=2.0, a0=2.0, b0=1.0)
    phi, r = dense(rows)
    precision = 2.0 * np.eye(D + 1) + phi.T @ phi
    mean = np.linalg.solve(precision, phi.T @ r[:, 0])
    a = 2.0 + 12 / 2
    b = 1.0 + 0.5 * (r[:, 0] @ r[:, 0] - mean @ precision @ mean)
    rng, count = np.random.default_rng(0), 400_000
    sigma2 = b / rng.gamma(a, size=count)
    root = np.linalg.cholesky(np.linalg.inv(precision))
    x = np.asarray([0.5, -1.0, 2.0, 0.0, 1.0, 1.0])
    centre = (rng.standard_normal((count, D + 1)) @ root.T) @ x
    y = mean @ x + np.sqrt(sigma2) * (centre + rng.standard_normal(count))
    found = student_t.spread(state, x[None, :-1], np.zeros((1, K)))
    variance = state.settings["noise_variance"][0] + found.variance[0, 0]
    df = state.settings["df"]
    assert variance == pytest.approx(y.var(), rel=0.02)
    levels = np.asarray([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    scale = math.sqrt(variance * (df - 2) / df)
    want = distributions.t.ppf(levels, df, loc=found.shift[0, 0], scale=scale)
    got = np.quantile(y, levels)
    np.testing.assert_allclose(got, want, atol=0.03 * scale)
    density = -student_nll(np.asarray([0.7]), np.asarray([variance]), df)
    assert density[0] == pytest.approx(distributions.t.logpdf(0.7, df, scale=scale), rel=1e-10)


def test_a_certain_noise_is_bayesian_linear_regression() -> None:
    head, rows = material()
    s2 = 1.3
    state = fitted(rows, head, prior_precision=0.6, a0=1e9, b0=1e9 * s2)
    phi, _ = dense(rows)
    v = np.einsum("ni,ij,nj->n", phi, np.linalg.inv(0.6 * np.eye(D + 1) + phi.T @ phi), phi)
    found = student_t.spread(state, rows.phi, rows.z)
    total = found.variance + state.settings["noise_variance"]
    np.testing.assert_allclose(total, np.tile(s2 * (1 + v)[:, None], (1, K)), rtol=1e-6)
    assert student_nll(np.ones(1), np.ones(1), state.settings["df"])[0] == pytest.approx(
        0.5 * math.log(2 * math.pi) + 0.5, abs=1e-5
    )


def test_the_student_t_process_with_the_linear_kernel_says_the_same() -> None:
    head, rows = material(n=30)
    d, a0, b0 = 0.9, 1.5, 0.7
    state = fitted(rows, head, prior_precision=d, a0=a0, b0=b0)
    phi, r = dense(rows)
    kernel = phi @ phi.T / d + np.eye(30)
    _, fresh = material(n=7, seed=5)
    new, _ = dense(fresh)
    cross = new @ phi.T / d
    solved = np.linalg.solve(kernel, cross.T)
    own = (new**2).sum(1) / d + 1 - (cross * solved.T).sum(1)
    found = student_t.spread(state, fresh.phi, fresh.z)
    np.testing.assert_allclose(found.shift, solved.T @ r, rtol=1e-9)
    squared = np.einsum("nc,nm,mc->c", r, np.linalg.inv(kernel), r)
    df = 2 * a0 + 30
    scale2 = own[:, None] * (b0 + 0.5 * squared) / (df / 2)
    total = found.variance + state.settings["noise_variance"]
    np.testing.assert_allclose(total, scale2 * df / (df - 2), rtol=1e-9)


def test_the_evidence_is_a_density_and_the_prior_precision_its_maximum() -> None:
    head, rows = material(n=25)
    stats = student_t.update(student_t.init(head, "regression", Settings()), rows)
    phi, r = dense(rows)
    b0 = np.asarray([0.4, 1.9])
    want = sum(
        distributions.multivariate_t.logpdf(
            r[:, k], shape=b0[k] / 2.5 * (np.eye(25) + phi @ phi.T / 0.8), df=5.0
        )
        for k in range(K)
    )
    assert student_t.log_evidence(stats, 0.8, 2.5, b0) == pytest.approx(want, rel=1e-10)
    state = student_t.finish(stats, head, Settings())
    best, prior = state.settings["prior_precision"], np.asarray(state.settings["b0"])
    np.testing.assert_allclose(prior, 2.0 * (r**2).mean(0))
    at = [student_t.log_evidence(stats, best * f, 2.0, prior) for f in (0.9, 1.0, 1.1)]
    assert at[1] > at[0] and at[1] > at[2]
    grid = [student_t.log_evidence(stats, d, 2.0, prior) for d in np.logspace(-6, 8, 400)]
    assert at[1] >= max(grid)


def test_rows_that_agree_with_the_frozen_head_leave_it_alone() -> None:
    head, rows = material(n=200)
    noise = np.random.default_rng(4).normal(size=rows.z.shape)
    clean = Features(rows.phi, rows.z, rows.z + noise)
    state = fitted(clean, head)
    found = student_t.spread(state, rows.phi, rows.z)
    assert np.abs(found.shift).max() < 0.3
    refit = fitted(clean, head, prior_precision=1e-9)
    assert np.abs(student_t.spread(refit, rows.phi, rows.z).shift).max() > np.abs(found.shift).max()


def test_observed_rows_are_a_fit_on_all_of_them() -> None:
    head, rows = material(n=3000)
    how = {"prior_precision": 1e-4, "a0": 2.0, "b0": 0.5}
    state = fitted(take(rows, slice(0, 20)), head, **how)
    for i in range(20, 3000, 149):
        state = student_t.observe(state, take(rows, slice(i, i + 149)))
    whole = fitted(rows, head, **how)
    _, fresh = material(seed=9)
    got, want = (student_t.spread(s, fresh.phi, fresh.z) for s in (state, whole))
    for part in ("variance", "shift", "directions"):
        np.testing.assert_allclose(getattr(got, part), getattr(want, part), rtol=1e-9, atol=1e-12)
    assert state.settings["rows"] == 3000
    assert state.settings["df"] == whole.settings["df"]
    np.testing.assert_allclose(
        state.settings["noise_variance"], whole.settings["noise_variance"], rtol=1e-9
    )


def test_observing_leaves_the_old_state_and_refuses_what_it_cannot_use() -> None:
    head, rows = material()
    state = fitted(rows, head)
    before = {k: v.copy() for k, v in state.tensors.items()}
    student_t.observe(state, take(rows, slice(0, 3)))
    for key, value in before.items():
        np.testing.assert_array_equal(state.tensors[key], value)
    with pytest.raises(FitError, match="with features and labels"):
        student_t.observe(state, Features(rows.phi, rows.z))
    bad = Features(rows.phi, rows.z, np.full_like(rows.y, np.nan))
    with pytest.raises(FitError, match="not finite"):
        student_t.observe(state, bad)


def test_unusable_rows_are_named() -> None:
    head, rows = material()
    with pytest.raises(FitError, match="without error"):
        fitted(Features(rows.phi, rows.z, rows.z), head)
    with pytest.raises(FitError, match="raise a0"):
        fitted(take(rows, slice(0, 1)), head, a0=0.4)
