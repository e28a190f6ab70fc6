"""Weighted thresholds against loops and identities, and coverage where the shift is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from calibration.bundle import threshold_at
from calibration.shift.class_shift import bbse, em
from calibration.shift.density_ratio import (
    DensityRatio,
    check_overlap,
    design,
    fit_density_ratio,
)
from calibration.shift.retasa import retasa
from calibration.shift.weighted import effective_rows, restored, threshold, weighted
from posthoc.contract import DataError, FitError
from posthoc.graph import Fragment, standalone
from posthoc.links import softmax
from posthoc.runtime import open_session

ALPHA = 0.1


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(0, 5),
    st.sampled_from([0.05, 0.1, 0.25, 0.5]),
)
def test_a_weighted_threshold_is_its_definition(
    rows: list[tuple[int, int]], own: int, alpha: float
) -> None:
    rows = sorted(rows)
    s, w = (np.asarray(v, float) for v in zip(*rows, strict=True))
    wanted = (1 - alpha) * (w.sum() + own) - 1e-9 * max(1.0, w.sum() + own)
    below, want = 0.0, math.inf
    for score, weight in rows:
        below += weight
        if below >= wanted:
            want = score
            break
    assert threshold(s, w, alpha, own) == want


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 300), st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.37]), st.floats(0.1, 30))
def test_equal_weights_have_the_conformal_rank(n: int, alpha: float, w: float) -> None:
    s = np.arange(n, dtype=float)
    assert threshold(s, np.full(n, w), alpha, w) == threshold_at(s, alpha)
    assert threshold(s, np.full(n, w), alpha, math.inf) == math.inf
    with pytest.raises(DataError, match="strictly between"):
        threshold(s, np.full(n, w), 1.0, w)


def test_too_few_effective_rows_are_refused() -> None:
    s, w = np.arange(1000.0), np.where(np.arange(1000) < 20, 1.0, 1e-6)
    with pytest.raises(FitError, match=r"1000 conformal rows are worth 20\.0"):
        weighted("target", s, w, np.ones(3))
    with pytest.raises(FitError, match="finite"):
        weighted("target", s, w * np.nan, np.ones(3))
    assert effective_rows(np.ones(70)) == pytest.approx(70)


def test_a_shift_of_classes_is_found_and_covered() -> None:
    """The third class comes six times as often: weights are found from rows without labels, and
    sets that were short of it cover again."""
    before, after = np.asarray([0.45, 0.45, 0.1]), np.asarray([0.2, 0.2, 0.6])
    found: dict[str, list[float]] = {"em": [], "bbse": [], "none": [], "oracle": []}
    off: dict[str, list[np.ndarray]] = {"em": [], "bbse": []}
    for seed in range(30):
        rng = np.random.default_rng(seed)

        def draw(n: int, shares: np.ndarray, rng: np.random.Generator = rng) -> tuple:
            y = rng.choice(3, n, p=shares)
            x = np.eye(3)[y] * 2 + rng.normal(size=(n, 3))
            return y, softmax(x * 2 + np.log(before))  # the posterior under the old shares

        (y, p), (yc, pc) = draw(2000, before), draw(1000, before)
        unlabelled, (yt, pt) = draw(2000, after)[1], draw(4000, after)
        weights = {
            "em": em(np.bincount(y) / 2000, unlabelled),
            "bbse": bbse(p.argmax(1), y, unlabelled.argmax(1), 3),
            "oracle": after / before,
            "none": np.ones(3),
        }
        for name, kept in off.items():
            kept.append(weights[name] * np.bincount(y) / 2000 - after)
        for name, w in weights.items():
            made = weighted("target", 1 - pc[np.arange(1000), yc], w[yc], w)
            q = made.thresholds(ALPHA)
            found[name].append(float((1 - pt <= q)[np.arange(4000), yt].mean()))
    for name, most in (("em", 0.03), ("bbse", 0.06)):
        assert np.abs(np.mean(off[name], axis=0)).max() < 0.02  # no bias
        assert np.abs(off[name]).mean() < most
    means = {k: np.mean(v) for k, v in found.items()}
    assert means["oracle"] > 0.9 - 2 * np.std(found["oracle"]) / np.sqrt(30)
    assert means["none"] < 0.87 < 0.88 < min(means["em"], means["bbse"])


def test_class_weights_say_what_they_cannot_know() -> None:
    p = softmax(np.random.default_rng(0).normal(size=(50, 3)))
    w = em(np.asarray([0.5, 0.5, 0.0]), p)
    assert w[2] == w[:2].max()
    with pytest.raises(FitError, match="no production rows"):
        em(np.full(3, 1 / 3), p[:0])
    with pytest.raises(FitError, match="singular value"):
        bbse(np.zeros(90, int), np.arange(90) % 3, np.zeros(20, int), 3)


def covariates(seed: int, n: int, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    x[:, 0] += tilt
    return x, np.abs(rng.normal(size=n)) * np.exp(x[:, 0])  # scores grow along the tilt


def test_a_shift_of_covariates_is_found_and_covered() -> None:
    """Inputs move by one standard deviation to where the model errs more: exp(x - 1/2) is the true
    ratio."""
    found: dict[str, list[float]] = {"estimated": [], "oracle": [], "none": []}
    for seed in range(20):
        x, s = covariates(seed, 1000, 0.0)
        fresh, truth = covariates(seed + 1000, 4000, 1.0)
        ratio = fit_density_ratio(covariates(seed + 500, 1500, 0.0)[0], fresh[:2000], seed)
        made = weighted("covariate", s, ratio.weights(x), np.zeros(0), ratio)
        q = made.of_rows(1 - ALPHA, fresh[2000:])
        found["estimated"].append(float((truth[2000:] <= q).mean()))
        w = np.exp(x[:, 0] - 0.5)
        own = np.exp(fresh[2000:3000, 0] - 0.5)
        order = np.argsort(s)
        each = [threshold(s[order], w[order], ALPHA, v) for v in own]
        found["oracle"].append(float((truth[2000:3000] <= each).mean()))
        found["none"].append(float((truth <= threshold_at(np.sort(s), ALPHA)).mean()))
    means = {k: np.mean(v) for k, v in found.items()}
    assert means["oracle"] > 0.9 - 2 * np.std(found["oracle"]) / np.sqrt(20)
    assert means["none"] < 0.8 and means["estimated"] > 0.88


@pytest.mark.parametrize("seen", [False, True])
def test_the_graph_gives_a_row_its_own_threshold(seen: bool) -> None:
    """The ratio of outputs alone, and of features that are far from zero and tell the shift."""
    x, s = covariates(1, 800, 0.0)
    fresh = covariates(2, 700, 1.0)[0]
    z = np.concatenate([covariates(3, 200, 0.5)[0], [[50, 50], [-50, 0]]]).astype(np.float32)
    phi = {}
    if seen:
        mix = np.random.default_rng(0).normal(size=(2, 6))
        phi = {k: v @ mix + 1000 for k, v in (("old", x), ("new", fresh), ("asked", z))}
        x, fresh, z = x[:, 1:], fresh[:, 1:], z[:, 1:]  # the outputs show nothing of it
    ratio = fit_density_ratio(x, fresh, features=(phi["old"], phi["new"]) if seen else None)
    assert (ratio.projection is not None) == seen
    weights = ratio.weights(x, phi.get("old"))
    made = weighted("covariate", s.astype("f4"), weights, np.zeros(0), ratio)
    again = restored("covariate", made.tensors(), made.scores)
    asked = phi["asked"].astype(np.float32) if seen else None
    for level in (0.5, 0.9, 0.99, 0.9999):
        g = Fragment()
        q = g.input("level", "float32", ["R"])
        features = g.input("phi", "float32", ["N", 6]) if seen else None
        outputs = g.input("z", "float32", ["N", z.shape[1]])
        g.publish(again.emit_of_rows(g, q, outputs, features), "q")
        session = open_session(standalone(g, {"q": ("float32", (-1,))}))
        feed = {"z": z, "level": np.asarray([level], np.float32)}
        (got,) = session.run(None, feed | ({} if asked is None else {"phi": asked}))
        want = made.of_rows(level, z, asked)
        place = np.searchsorted(np.append(made.scores, np.inf), [got, want.astype("f4")])
        assert ((place[0] - place[1]) >= 0).all() and (place[0] - place[1]).max() <= 1
    if seen:
        with pytest.raises(FitError, match="none were given"):
            ratio.weights(x)


def test_features_that_tell_nothing_more_are_left_out() -> None:
    x, fresh = covariates(1, 800, 0.0)[0], covariates(2, 700, 1.0)[0]
    noise = np.random.default_rng(0).normal(size=(1500, 40))
    ratio = fit_density_ratio(x, fresh, features=(noise[:800], noise[800:]))
    assert ratio.projection is None
    alone = fit_density_ratio(x, fresh)
    np.testing.assert_array_equal(ratio.weights(x), alone.weights(x))
    constant = fit_density_ratio(x, fresh, features=(np.ones((800, 3)), np.ones((700, 3))))
    assert constant.projection is None


def test_harder_rows_are_found_among_many_outputs() -> None:
    """300 rows of 120 logits that differ in little but their doubt, which alone tells the shift."""
    rng = np.random.default_rng(0)
    made = []
    for hard in (False, True):
        sharp = rng.uniform(1, 3, size=1200) - hard
        z = (
            rng.normal(size=(1200, 120))
            + 4 * sharp[:, None] * np.eye(120)[rng.integers(0, 120, 1200)]
        )
        made.append((z, sharp))
    (x, sharp), (fresh, _) = made
    ratio = fit_density_ratio(x[:300], fresh[:300], temperature=1.0)
    assert not ratio.scale[:120].any() and ratio.scale[120:].all()
    w = ratio.weights(x[300:])
    easy = sharp[300:] > 2  # no production row is as sure
    assert w[easy].mean() < 0.3 * w[~easy].mean()


def test_labelled_rows_stand_for_production_or_are_refused() -> None:
    x = covariates(1, 2000, 0.0)[0]
    near, far = (fit_density_ratio(x, covariates(2, 2000, t)[0]).weights(x) for t in (1, 30))
    assert near.mean() == pytest.approx(1, abs=0.1)
    check_overlap(float(near.mean()))
    with pytest.raises(FitError, match=r"stand for 0\.02 of the production rows"):
        check_overlap(float(far.mean()))
    y = np.random.default_rng(0).normal(size=400)
    with pytest.raises(FitError, match=r"stand for 0\.\d+ of the production rows"):
        retasa(y, y, y + 20)


def test_the_ratio_is_a_logistic_regression_and_none_without_a_shift() -> None:
    x, far = covariates(0, 3000, 0.0)[0], covariates(1, 2000, 1.0)[0]
    ratio = fit_density_ratio(x, far)
    true = np.exp(x[:, 0] - 0.5)
    assert np.corrcoef(ratio.weights(x), true)[0, 1] > 0.97
    theirs = LogisticRegression(C=1e6, max_iter=1000).fit(
        design(np.concatenate([x, far]), ratio.mean, ratio.scale), np.repeat([0, 1], [3000, 2000])
    )
    odds = theirs.decision_function(design(x, ratio.mean, ratio.scale)) - math.log(2 / 3)
    assert np.abs(np.log(ratio.weights(x)) - odds).mean() < 0.05
    same = fit_density_ratio(x, covariates(2, 3000, 0.0)[0])
    assert np.abs(same.weights(x) - 1).mean() < 0.1
    constant = np.column_stack([x[:, 0], np.full(3000, 7.0)])
    made = fit_density_ratio(constant, constant[:2000])
    assert np.isfinite(made.weights(constant)).all()
    again = DensityRatio.restored(made.tensors())
    np.testing.assert_array_equal(again.weights(constant), made.weights(constant))
    for bad, message in ((x[:5], "too few"), (x * np.nan, "not finite")):
        with pytest.raises(FitError, match=message):
            fit_density_ratio(bad, x)


def test_retasa_covers_under_a_shift_of_targets() -> None:
    """y from N(0,1) to N(.8,.7²), the errors of the model growing with y."""
    found: dict[str, list[float]] = {"retasa": [], "none": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)

        def draw(n: int, mean: float, sd: float, rng: np.random.Generator = rng) -> tuple:
            y = rng.normal(mean, sd, n)
            return y, y + rng.normal(size=n) * np.exp(0.5 * y) * 0.4  # x, given y

        (y, x), (_, new) = draw(400, 0, 1), draw(400, 0.8, 0.7)
        truth, said = draw(3000, 0.8, 0.7)
        w = retasa(x, y, new, seed)
        s = np.abs(y - x)
        made = weighted("target", s, w, np.asarray([w.max()]))
        found["retasa"].append(float((np.abs(truth - said) <= made.thresholds(ALPHA)).mean()))
        found["none"].append(
            float((np.abs(truth - said) <= threshold_at(np.sort(s), ALPHA)).mean())
        )
    assert np.mean(found["none"]) < 0.86 < 0.88 < np.mean(found["retasa"])
    with pytest.raises(FitError, match="too few for a shift"):
        retasa(np.ones(5), np.ones(5), np.ones(50))
    with pytest.raises(FitError, match="not finite"):
        retasa(np.full(50, np.nan), np.ones(50), np.ones(50))


def test_retasa_of_many_rows_is_that_of_a_sample() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=4000)
    x = y + rng.normal(size=4000) * 0.3
    w = retasa(x, y, x[:2000] + 0.5)
    assert len(w) == 4000 and w.mean() == pytest.approx(1)
    assert np.corrcoef(w, y)[0, 1] > 0.5
