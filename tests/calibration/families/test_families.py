"""Families of probabilities against their definitions, other libraries, and temperature scaling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.stats import t as student
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from calibration.families import BINARY, FAMILIES, Family, apply_family, emit_family, fit_family
from calibration.families import isotonic as iso
from calibration.families.choice import candidates, chosen, gains
from calibration.families.structured import fit, mixed, objective
from posthoc.contract import FitError
from posthoc.folds import log_softmax
from posthoc.graph import Fragment, standalone
from posthoc.methods.temperature import fit_temperature
from posthoc.runtime import open_session

every = pytest.mark.parametrize("name", FAMILIES)


def classes_of(name: str) -> int:
    return 2 if name in BINARY else 5


def rows(n: int, c: int, seed: int, wrong: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a calibrated model, but that its odd classes are ``wrong`` off."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, c)) * 2
    true = z * (1 + wrong * (np.arange(c) % 2)) + wrong * np.arange(c) / c
    y = (log_softmax(true) + rng.gumbel(size=z.shape)).argmax(1)
    return log_softmax(z), y


def nll(log_p: np.ndarray, y: np.ndarray) -> float:
    return -float(log_p[np.arange(len(y)), y].mean())


@every
def test_it_makes_probabilities(name: str) -> None:
    c = classes_of(name)
    log_p, y = rows(600, c, 0, 0.5)
    made = apply_family(fit_family(name, log_p, y), log_p)
    np.testing.assert_allclose(np.exp(made).sum(1), 1, atol=1e-9)
    assert nll(made, y) < nll(log_p, y)
    drawn = np.stack([log_p, log_p[::-1]], axis=1)  # draws of a row: N×S×C
    both = apply_family(fit_family(name, log_p, y), drawn)
    np.testing.assert_allclose(both[:, 0], made, atol=1e-12)
    np.testing.assert_allclose(both[:, 1], made[::-1], atol=1e-12)


@every
def test_on_a_calibrated_model_it_is_the_temperature(name: str) -> None:
    c = classes_of(name)
    log_p, y = rows(20_000, c, 1)
    fresh, truth = rows(20_000, c, 2)
    made = apply_family(fit_family(name, log_p, y), fresh)
    assert abs(nll(made, truth) - nll(fresh, truth)) < 2e-3


@every
@pytest.mark.parametrize("shape", [("N",), ("N", 3)])
def test_the_graph_is_the_definition(name: str, shape: tuple[object, ...]) -> None:
    c = classes_of(name)
    log_p, y = rows(900, c, 3, 0.5)
    family = fit_family(name, log_p, y)
    x = np.concatenate([log_p[:60], log_softmax(np.eye(c) * 60), log_softmax(np.eye(c) * 400)])
    if len(shape) > 1:
        x = np.stack([x, x[::-1], x * 0 - math.log(c)], axis=1)
    x = x.astype(np.float32)
    g = Fragment()
    names = emit_family(family, g, g.input("x", "float32", [*shape, c]))
    for made, out in zip(names, ("log_p", "p"), strict=True):
        g.publish(made, out)
    tail = (-1, *(3 for _ in shape[1:]), c)
    model = standalone(g, {"log_p": ("float32", tail), "p": ("float32", tail)})
    got_log, got = open_session(model).run(None, {"x": x})
    want = apply_family(family, x)
    np.testing.assert_allclose(got, np.exp(want), atol=1e-5)
    assert np.isfinite(got_log).all()


@every
def test_probabilities_of_nought_and_one_and_classes_never_seen(name: str) -> None:
    c = classes_of(name)
    log_p, y = rows(400, c, 4)
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(c)[y])
    for x, labels in ((sure, y), (log_p, np.zeros(400, int)), (log_p[:3], y[:3])):
        family = fit_family(name, x, labels)
        made = apply_family(family, np.concatenate([sure, log_p]))
        assert np.isfinite(made).all()
        assert all(np.isfinite(v).all() for v in family.tensors.values())


def test_bad_input_is_named() -> None:
    log_p, y = rows(50, 3, 0)
    with pytest.raises(FitError, match="unknown scaling 'platt'"):
        fit_family("platt", log_p, y)
    for name in BINARY:
        with pytest.raises(FitError, match="two classes and the model has 3"):
            fit_family(name, log_p, y)
    with pytest.raises(FitError, match="no calibration rows"):
        fit_family("svs", log_p[:0], y[:0])
    with pytest.raises(FitError, match="not a number"):
        fit_family("ets", log_p * np.nan, y)


@pytest.mark.parametrize("matrix", [False, True])
def test_the_gradient_is_that_of_differences(matrix: bool) -> None:
    log_p, y = rows(40, 4, 5)
    value = objective(mixed(log_p, 0.01), y, matrix)
    at = np.random.default_rng(0).normal(size=(20 if matrix else 8)) * 0.3
    assert check_grad(lambda w: value(w)[0], lambda w: value(w)[1], at) < 1e-5


@pytest.mark.parametrize("matrix", [False, True])
def test_an_infinite_ridge_is_the_temperature(matrix: bool) -> None:
    log_p, y = rows(300, 4, 6, 0.7)
    tensors = fit(log_p, y, matrix, ridge=1e9)
    family = Family("sms", tensors)
    want = log_softmax(mixed(log_p, 1 / 301))
    np.testing.assert_allclose(apply_family(family, log_p), want, atol=1e-6)


def test_matrix_scaling_is_a_logistic_regression_with_that_ridge() -> None:
    """Many rows and two classes: without a ridge worth the name it is sklearn's on log-odds."""
    log_p, y = rows(4000, 2, 7, 0.6)
    made = apply_family(Family("sms", fit(log_p, y, True, ridge=1e-9)), log_p)
    x = mixed(log_p, 1 / 4001)
    theirs = LogisticRegression(C=1e9, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(np.exp(made)[:, 1], theirs.predict_proba(x)[:, 1], atol=2e-3)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.floats(0.2, 5.0))
def test_a_temperature_follows_the_scale_of_the_logits(scale: float) -> None:
    log_p, y = rows(200, 4, 8)
    alone = fit_temperature(log_p, y)
    assert fit_temperature(log_p * scale, y) == pytest.approx(alone * scale, rel=1e-3)


def test_ensemble_temperature_keeps_the_order_and_mixes_by_likelihood() -> None:
    log_p, y = rows(3000, 6, 9)
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(3000) < 0.2, rng.integers(0, 6, 3000), y)  # a fifth knows nothing
    family = fit_family("ets", log_p, noisy)
    assert family.tensors["weights"].sum() == pytest.approx(1)
    assert family.tensors["weights"][2] == pytest.approx(0.2, abs=0.05)
    made = apply_family(family, log_p)
    np.testing.assert_array_equal(np.argsort(made, 1), np.argsort(log_p, 1))
    # No weights nearby have a larger likelihood: the definition, tried by hand.
    w, t = family.tensors["weights"], family.tensors["temperature"][0]
    parts = np.stack([np.exp(log_softmax(log_p / t)), np.exp(log_p), np.full(log_p.shape, 1 / 6)])
    at = np.arange(3000), noisy
    best = -np.log(w @ parts[:, *at]).mean()
    for step in np.eye(3) * 0.02:
        other = (w + step) / (1 + 0.02)
        assert -np.log(other @ parts[:, *at]).mean() > best - 1e-4


def test_beta_is_a_logistic_regression() -> None:
    log_p, y = rows(5000, 2, 10, 0.5)
    a, b, c = fit_family("beta", log_p, y).tensors["weights"]
    x = np.column_stack([log_p[:, 1], -log_p[:, 0]])
    theirs = LogisticRegression(C=1e9, tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose([a, b, c], [*theirs.coef_[0], theirs.intercept_[0]], atol=0.02)
    upside_down = fit_family("beta", log_p[:, ::-1], y).tensors["weights"]
    assert (upside_down[:2] >= 0).all()


def test_beta_has_a_ridge_of_one_row() -> None:
    """No weights nearby cost less, of rows that are all right: without a ridge there is no end."""
    odds = np.linspace(-3, 3, 24)
    log_p, y = log_softmax(np.stack([0 * odds, odds], 1)), (odds > 0).astype(int)

    def cost(w: np.ndarray) -> float:
        made = apply_family(Family("beta", {"weights": w}), log_p)
        return 24 * nll(made, y) + float(((w - [1, 1, 0]) ** 2).sum())

    found = fit_family("beta", log_p, y).tensors["weights"]
    for step in np.concatenate([np.eye(3), -np.eye(3)]) * 0.02:
        assert cost(found + step) > cost(found)


def test_isotonic_has_sklearns_steps() -> None:
    log_p, y = rows(2000, 2, 11, 0.5)
    odds = (log_p[:, 1] - log_p[:, 0]).round(iso.DIGITS)
    tensors = iso.fit(log_p, y)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(odds, y).predict(odds)
    n = [int((theirs == v).sum()) for v in np.unique(theirs)]
    assert len(tensors["x"]) == len(n)
    p = np.exp(log_p[:, 1])
    for v, count, logit in zip(np.unique(theirs), n, tensors["y"], strict=True):
        own = p[theirs == v].mean()
        assert 1 / (1 + math.exp(-logit)) == pytest.approx(
            (v * count + own) / (count + 1), abs=1e-9
        )
    made = iso.apply(tensors, log_p)
    odds = log_p[:, 1] - log_p[:, 0]
    order = np.argsort(odds)
    assert (np.diff((made[:, 1] - made[:, 0])[order]) >= -1e-12).all()


def test_isotonic_does_not_rank_by_rounding() -> None:
    """Equal rows that came from unlike batches are one step, whichever of them had which class."""
    rng = np.random.default_rng(0)
    odds = np.repeat([-1.03, 0.41, 2.27], 200)
    y = (rng.random(600) < 1 / (1 + np.exp(-odds))).astype(int)
    jitter = odds + rng.normal(size=600) * 1e-6
    tensors = iso.fit(log_softmax(np.stack([0 * jitter, jitter], 1)), y)
    np.testing.assert_allclose(tensors["x"], [-1.03, 0.41, 2.27], atol=1e-4)
    shares = y.reshape(3, 200).mean(1)
    np.testing.assert_allclose(1 / (1 + np.exp(-tensors["y"])), shares, atol=0.005)


def test_a_sure_gain_is_taken_and_luck_is_not() -> None:
    log_p, y = rows(3000, 5, 12, 0.8)
    tried = gains(log_p, y, candidates(3000, 5))
    assert {g.name for g in tried} == {"ets", "svs", "sms"}
    assert chosen(tried) in ("svs", "sms")
    taken = 0
    for seed in range(20):
        log_p, y = rows(400, 5, 100 + seed)
        taken += chosen(gains(log_p, y, candidates(400, 5), seed)) is not None
    assert taken <= 3
    assert candidates(20, 5) == () and "sms" not in candidates(10_000, 101)
    assert set(candidates(200, 2)) == {"ets", "svs", "beta", "isotonic"}


def test_rows_of_one_item_count_as_one() -> None:
    """Rows copied twenty times over are no more evidence: gains, and their bounds, are those of the
    items, where row by row luck would be taken for a gain."""
    names = ("svs",)
    by_row = by_item = 0
    for seed in range(8):
        log_p, y = rows(60, 4, 300 + seed)
        keys = np.arange(60, dtype=np.uint64) * np.uint64(7)
        copies = np.repeat(log_p, 20, 0), np.repeat(y, 20)
        found = gains(*copies, names, seed, np.repeat(keys, 20))
        by_item += chosen(found) is not None
        by_row += chosen(gains(*copies, names, seed)) is not None
    assert by_item <= 1 and by_row >= 4
    one = gains(log_p, y, names, 3)
    for a, b in zip(gains(log_p, y, names, 3, keys), one, strict=True):
        assert (a.gain, a.low) == pytest.approx((b.gain, b.low))
    assert gains(*copies, names, 0, np.repeat(np.arange(4), 300)) == ()
    log_p, y = rows(500, 4, 0, 0.5)
    (gain,) = gains(log_p, y, ("svs",))
    fold = np.random.default_rng(0).permutation(500) % 5
    saved = np.empty(500)
    for k in range(5):
        made = apply_family(fit_family("svs", log_p[fold != k], y[fold != k]), log_p)
        saved[fold == k] = (made - log_p)[np.arange(500), y][fold == k]
    error = saved.std(ddof=1) / math.sqrt(500)
    low = saved.mean() - student.ppf(0.95, 499) * error
    assert (gain.gain, gain.low) == pytest.approx((saved.mean(), low))
    twice, _ = gains(log_p, y, ("svs", "svs"))  # of several the error of 5 % is shared out
    assert twice.low == pytest.approx(saved.mean() - student.ppf(0.975, 499) * error)
