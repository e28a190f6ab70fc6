"""The Bayesian bootstrap of a regression against closed forms and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from posthoc import registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.links import Spread
from posthoc.methods.heads import members
from posthoc.methods.heads.weights import dirichlet
from posthoc.rows import BLOCK, of
from tests.posthoc.methods.heads.material import C, N, fit, frozen, values

HEAD = frozen()


def spread_of(state: State, rows: Features) -> Spread:
    found: Spread = registry.page("bootstrap").spread(state, rows.phi, rows.z)
    return found


def refits(rows: Features, precision: float, seed: int, count: int) -> np.ndarray:
    """Predicted deviations S×N×K of scikit-learn's weighted ridge regressions."""
    phi = np.concatenate([rows.phi, np.ones((len(rows), 1))], 1)
    error = rows.y - rows.z
    weights = dirichlet(seed, len(rows), count)
    starts = range(0, len(rows), BLOCK)
    w = np.concatenate(
        [weights.of(b, min(BLOCK, len(rows) - i), range(count))[0] for b, i in enumerate(starts)]
    )
    made = np.empty((count, *error.shape))
    for m in range(count):
        for k in range(C):
            model = Ridge(alpha=precision * (error[:, k] ** 2).mean(), fit_intercept=False)
            made[m, :, k] = model.fit(phi, error[:, k], w[:, m]).predict(phi)
    return made


@pytest.mark.parametrize("n", [N, BLOCK + 200])
def test_scikit_learn_gives_the_same_mean_and_variance(n: int) -> None:
    rows = values(HEAD, n)
    state = fit("bootstrap", HEAD, rows, "regression", members=6, prior_precision=2.0, seed=4)
    want = refits(rows, 2.0, 4, 6)
    got = spread_of(state, rows)
    np.testing.assert_allclose(got.shift, want.mean(0), atol=1e-5)
    np.testing.assert_allclose(got.variance, want.var(0, ddof=1), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(got.amplitude**2, got.variance, rtol=1e-12)


def test_the_noise_is_what_the_mean_member_leaves() -> None:
    rows = values(HEAD, 600)
    state = fit("bootstrap", HEAD, rows, "regression")
    left = rows.y - rows.z - spread_of(state, rows).shift
    noise = np.asarray(state.settings["noise_variance"])
    np.testing.assert_allclose(noise, (left**2).mean(0), rtol=0.02)
    np.testing.assert_allclose(noise, [0.25, 1.0, 4.0], rtol=0.2)
    assert (noise > (left**2).mean(0)).all()  # effective parameters are taken off the rows


def test_the_mean_of_a_constant_feature_has_the_dirichlet_variance() -> None:
    rng = np.random.default_rng(0)
    n = 40
    y = rng.normal(size=(n, 1)) * 3 + 5
    rows = Features(np.ones((n, 1)), np.zeros((n, 1)), y)
    head = LinearHead(np.zeros((1, 1)), np.zeros(1))
    state = fit("bootstrap", head, rows, "regression", members=3000, prior_precision=1e-9)
    got = spread_of(state, rows)
    # Rubin 1981: the variance of sum of w y is the sum of (y - mean)² over n (n + 1).
    want = ((y - y.mean()) ** 2).sum() / (n * (n + 1))
    assert got.variance[0, 0] == pytest.approx(want, rel=0.06)
    assert got.shift[0, 0] == pytest.approx(y.mean(), abs=4 * np.sqrt(want / 3000))


def test_the_default_precision_maximises_the_evidence() -> None:
    rows = values(HEAD, 300)
    found = fit("bootstrap", HEAD, rows, "regression", members=2).settings["prior_precision"]
    phi = np.concatenate([rows.phi, np.ones((300, 1))], 1)
    mu = np.linalg.eigvalsh(phi.T @ phi)
    h = np.divide.outer(mu, ((rows.y - rows.z) ** 2).mean(0)).ravel()
    norm = (HEAD.weight**2).sum() + (HEAD.bias**2).sum()

    def log_evidence(d: float) -> float:
        return float(-0.5 * np.log1p(h / d).sum() - 0.5 * d * norm)

    best = log_evidence(found)
    assert best > log_evidence(0.97 * found) and best > log_evidence(1.03 * found)


def test_groups_of_members_are_as_good_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = values(HEAD)
    together = spread_of(fit("bootstrap", HEAD, rows, "regression"), rows)
    monkeypatch.setattr("posthoc.methods.heads.ridge.MEMORY", 1)
    alone = spread_of(fit("bootstrap", HEAD, rows, "regression"), rows)
    np.testing.assert_allclose(alone.variance, together.variance, rtol=1e-6)
    np.testing.assert_allclose(alone.shift, together.shift, rtol=1e-6, atol=1e-9)


def test_more_features_than_rows_are_taken() -> None:
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(1, 60)), np.zeros(1))
    phi = rng.normal(size=(20, 60)).astype(np.float16)
    z = phi.astype(np.float64) @ head.weight.T
    rows = Features(phi, z, z + rng.normal(size=z.shape))
    state = fit("bootstrap", head, rows, "regression")
    got = spread_of(state, rows)
    assert np.isfinite(got.variance).all() and got.variance.min() > 0
    assert 0 < state.settings["noise_variance"][0] < 10


def test_rows_without_error_and_heads_without_weights_are_named() -> None:
    rows = values(HEAD)
    with pytest.raises(FitError, match="without error"):
        fit("bootstrap", HEAD, Features(rows.phi, rows.z, rows.z), "regression")
    nothing = frozen(zero=True)
    with pytest.raises(FitError, match="predicts nothing"):
        fit("bootstrap", nothing, values(nothing), "regression")
    wide = LinearHead(np.ones((1, 100_000)), np.zeros(1))
    few = Features(np.ones((2, 100_000), np.float32), np.zeros((2, 1)), np.ones((2, 1)))
    with pytest.raises(FitError, match="limit"):
        registry.fit("bootstrap", wide, "regression", of(few), {"members": 3000})
    assert members.LIMIT == 200_000_000
