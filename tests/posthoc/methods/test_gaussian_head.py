"""The Gaussian head against densities, scikit-learn's discriminant analysis and its own parts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import multivariate_normal, norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from calibration import scaling
from posthoc import registry
from posthoc.contract import Features, FitError, State
from posthoc.links import decompose, log_probs, softmax
from posthoc.methods import gaussian_head, held
from posthoc.methods.gaussian_head import Settings, Stats
from posthoc.methods.temperature import fit_temperature
from posthoc.rows import join, of, take

D, C, N = 4, 3, 600


def material(n: int = N, seed: int = 0, spread: float = 1.5) -> Features:
    """Gaussian classes with one covariance, and a frozen head that is wrong about them."""
    rng = np.random.default_rng(seed)
    root = np.tril(np.random.default_rng(9).normal(size=(D, D))) + np.eye(D)
    y = rng.integers(0, C, n)
    means = np.random.default_rng(8).normal(size=(C, D))
    phi = means[y] * spread + 20.0 + rng.normal(size=(n, D)) @ root.T
    z = 3.0 * np.random.default_rng(7).normal(size=(C, D)) @ (phi - 20.0).T
    return Features(phi, z.T, y)


def fit(rows: Features, **settings: object) -> State:
    return registry.fit("gaussian", None, "classification", of(rows), settings)


def gaussian_logits(state: State, rows: Features) -> np.ndarray:
    """What the second member says, up to a constant of each row."""
    return rows.z + gaussian_head.spread(state, rows.phi, rows.z).draws[:, 1]


def stats(rows: Features, settings: Settings = Settings()) -> Stats:  # noqa: B008
    return gaussian_head.update(gaussian_head.init(None, "classification", settings), rows)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_member_is_bayes_rule_on_gaussian_densities(covariance: str) -> None:
    rows, fresh = material(), material(seed=1)
    state = fit(rows, covariance=covariance, shrinkage=0.2)
    means = np.stack([rows.phi[rows.y == c].mean(0) for c in range(C)])
    centred = rows.phi - means[rows.y]
    s = centred.T @ centred / N
    if covariance == "diagonal":
        s = np.diag(np.diag(s))
    s = 0.8 * s + 0.2 * np.trace(s) / D * np.eye(D)
    prior = (np.bincount(rows.y) + 1) / (N + C)
    log_density = np.stack(
        [np.log(prior[c]) + multivariate_normal.logpdf(fresh.phi, means[c], s) for c in range(C)], 1
    )
    told = state.settings
    np.testing.assert_allclose(
        softmax(gaussian_logits(state, fresh) / told["frozen_temperature"]),
        softmax(log_density / told["temperature"]),
        atol=1e-9,
    )


def test_naive_bayes_is_a_product_of_densities() -> None:
    rows = material()
    state = fit(rows, covariance="diagonal", shrinkage=1e-9)
    means = np.stack([rows.phi[rows.y == c].mean(0) for c in range(C)])
    sd = (rows.phi - means[rows.y]).std(0)
    want = np.log(np.bincount(rows.y) + 1.0) + np.stack(
        [norm.logpdf(rows.phi, means[c], sd).sum(1) for c in range(C)], 1
    )
    told = state.settings
    got = gaussian_logits(state, rows) * told["temperature"] / told["frozen_temperature"]
    np.testing.assert_allclose(
        got - got.mean(1, keepdims=True), want - want.mean(1, keepdims=True), atol=1e-6
    )


def test_scikit_learn_agrees() -> None:
    rows, fresh = material(), material(seed=1)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(rows.phi, rows.y)
    state = fit(rows, shrinkage=0.3)
    told = state.settings
    got = softmax(
        gaussian_logits(state, fresh) * told["temperature"] / told["frozen_temperature"]
        - np.log(np.bincount(rows.y) + 1.0)
        + np.log(np.bincount(rows.y))
    )
    np.testing.assert_allclose(got, peer.predict_proba(fresh.phi), atol=1e-8)


def test_shrinkage_and_temperatures_are_the_best_on_rows_out_of_the_sums() -> None:
    rows = material(n=120, spread=0.15)
    found = stats(rows)
    out = found.held.rows
    told = fit(rows).settings
    nll = {}
    for shrinkage in gaussian_head.SHRINKAGES:
        weight, bias = gaussian_head._fit(found).head(shrinkage)
        z = (out.phi - gaussian_head._fit(found).mean) @ weight + bias
        nll[shrinkage] = min(scaling.mean_nll(z / t, out.y) for t in np.logspace(-1, 2, 400))
    best = min(nll, key=nll.get)
    assert nll[told["shrinkage"]] <= nll[best] + 1e-3
    assert told["held_out_nll"] == pytest.approx(nll[best], abs=0.02)
    assert told["held_out_rows"] == len(out) == 120 - int(found.count.sum())
    assert told["rows"] == 120


def test_the_temperature_is_that_of_the_calibration() -> None:
    rows = material(n=4000)
    assert fit_temperature(rows.z, rows.y) == pytest.approx(
        scaling.fit_temperature(rows.z, rows.y)[0], rel=1e-2
    )
    sure = np.eye(C)[rows.y] * 5.0
    assert 0.3 < fit_temperature(sure, rows.y) < 1.0  # no error at all, and still no zero


def test_epistemic_is_the_jensen_shannon_divergence_of_the_two_heads() -> None:
    rows = material()
    spread = gaussian_head.spread(fit(rows), rows.phi, rows.z)
    t, k = 1.3, 0.7
    _, epistemic = decompose(rows.z, spread, None, t, (k / t) ** 2)
    frozen = softmax(rows.z / t)
    other = softmax((rows.z + k * spread.draws[:, 1]) / t)
    want = jensenshannon(frozen.T, other.T) ** 2
    np.testing.assert_allclose(epistemic, want, atol=1e-9)
    mixed = np.exp(log_probs(rows.z, spread, t, (k / t) ** 2))
    np.testing.assert_allclose(mixed, (frozen + other) / 2, atol=1e-12)


def test_the_mixture_helps_where_the_frozen_head_is_wrong() -> None:
    state, rows, fresh = fit(material()), material(seed=2), material(seed=3)
    spread = gaussian_head.spread(state, rows.phi, rows.z)
    found = scaling.fit_classification(rows.z, rows.y, spread)
    ahead = gaussian_head.spread(state, fresh.phi, fresh.z)
    log_p = log_probs(fresh.z, ahead, found.temperature, found.strength)
    nll = -log_p[np.arange(N), fresh.y].mean()
    assert nll < scaling.mean_nll(fresh.z / found.temperature_alone, fresh.y) - 0.1


def test_the_same_rows_are_held_out_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "SIZE", 40)
    rows = material()
    whole = stats(rows)
    assert len(whole.held) == 40
    assert whole.count.sum() == N - 40
    order = np.random.default_rng(0).permutation(N)
    mixed = take(rows, order)
    half = Settings()
    left, right = (gaussian_head.init(None, "classification", half) for _ in "ab")
    for i in range(0, N, 25):
        if i % 2:
            left = gaussian_head.update(left, take(mixed, slice(i, i + 25)))
        else:
            right = gaussian_head.update(right, take(mixed, slice(i, i + 25)))
    both = gaussian_head.merge(left, right)
    np.testing.assert_array_equal(both.held.keys, whole.held.keys)
    np.testing.assert_array_equal(both.held.rows.phi, whole.held.rows.phi)
    np.testing.assert_array_equal(both.count, whole.count)
    np.testing.assert_allclose(both.second, whole.second, rtol=1e-12)


def test_copies_lie_on_one_side_and_no_row_is_lost() -> None:
    rows = material()
    twice = join([rows, rows])
    found = stats(twice)
    inside = {row.tobytes() for row in found.held.rows.phi}
    assert found.count.sum() + len(found.held) == 2 * N
    assert len(found.held) == 2 * len(inside)
    assert 0.1 * N < len(inside) < 0.3 * N
    np.testing.assert_array_equal(
        held.hashes(rows.phi.astype(np.float32)),
        held.hashes(rows.phi.astype(np.float32).astype(np.float64)),
    )
    assert len(set(held.hashes(rows.phi).tolist())) == N


def test_zeros_of_either_sign_are_one_row() -> None:
    phi = np.asarray([[0.0, 1.0], [-0.0, 1.0]])
    assert len(set(held.hashes(phi).tolist())) == 1


def test_copies_with_other_labels_are_cut_alike_in_any_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(held, "SIZE", 5)
    row = next(r for r in material().phi if held.hashes(r[None])[0] % 5 == 0)
    y = np.arange(9) % C
    rows = Features(np.tile(row, (9, 1)), np.zeros((9, C)), y)
    kept = [
        held.hold(held.Held(), take(rows, order))[0].rows.y
        for order in (y.argsort(), np.argsort(-y))
    ]
    np.testing.assert_array_equal(kept[0], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(kept[1], kept[0])


def test_rows_and_classes_may_come_later() -> None:
    rows = material()
    late = rows.y == 2
    first, then = take(rows, ~late), take(rows, late)
    early = gaussian_head.finish(stats(first), None, Settings())
    assert early.settings["classes_without_rows"] == 1
    probabilities = softmax(gaussian_logits(early, rows))
    assert np.isfinite(probabilities).all()
    assert probabilities[:, 2].mean() < 0.05
    grown = gaussian_head.finish(gaussian_head.update(stats(first), then), None, Settings())
    assert grown.settings["classes_without_rows"] == 0
    want = gaussian_head.finish(stats(rows), None, Settings())
    np.testing.assert_allclose(
        gaussian_logits(grown, rows), gaussian_logits(want, rows), rtol=1e-9, atol=1e-9
    )


def test_more_features_than_rows_are_taken() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, C, 40)
    phi = rng.normal(size=(40, 100)) + np.eye(C, 100)[y] * 3
    rows = Features(phi, phi[:, :C], y)
    for covariance in ("full", "diagonal"):
        state = fit(rows, covariance=covariance)
        assert np.isfinite(gaussian_logits(state, rows)).all()


def test_unusable_rows_are_named() -> None:
    rows = material()
    with pytest.raises(FitError, match="two classes or more, and has 1"):
        fit(Features(rows.phi, rows.z, np.zeros(N, np.int64)))
    flat = Features(np.eye(C, D)[rows.y] + 3.0, rows.z, rows.y)
    with pytest.raises(FitError, match="constant within every class"):
        fit(flat)
    with pytest.raises(FitError, match="hold out"):
        fit(take(rows, slice(0, 1)))
    same = Features(np.tile(rows.phi[:1], (N, 1)), rows.z, rows.y)
    with pytest.raises(FitError, match=r"rows that differ|constant within"):
        fit(same)
