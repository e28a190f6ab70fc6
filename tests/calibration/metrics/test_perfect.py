"""The range of a perfect model: perfect models lie in it, others do not."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.metrics.brier import reliability
from calibration.metrics.class_calibration import class_bins
from calibration.metrics.equal_mass import equal_mass_ece
from calibration.metrics.ks import ks_error
from calibration.metrics.perfect import perfect_class_ranges, perfect_ence, perfect_ranges
from calibration.metrics.smooth import smooth_ece
from calibration.metrics.uce import expected_normalised_calibration_error
from posthoc.contract import F64, I64, DataError
from posthoc.folds import run

FIGURES = {"mass": equal_mass_ece, "ks": ks_error, "smooth": smooth_ece}
CLASSWISE = {"reliability": reliability, "static": lambda b: b.static}


def confidences(seed: int, sharpness: float = 1.0) -> tuple[F64, F64]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(2, 1.5, 400)
    right = rng.random(400) < 1 / (1 + np.exp(-logit))
    return 1 / (1 + np.exp(-sharpness * logit)), right.astype(np.float64)


def classes(seed: int, power: float = 1.0, n: int = 300) -> tuple[F64, I64]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(4, 0.5), n)
    y = (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    p = p**power
    return p / p.sum(axis=1, keepdims=True), y


def test_perfect_models_lie_in_the_range() -> None:
    inside = dict.fromkeys(FIGURES, 0)
    for seed in range(60):
        c, right = confidences(seed)
        order = np.argsort(c)
        c, right = c[order], right[order]
        made = perfect_ranges(c, {k: _of(f, c) for k, f in FIGURES.items()}, n_sim=60, seed=seed)
        for name, figure in FIGURES.items():
            inside[name] += made[name][0] <= figure(c, right) <= made[name][1]
    # 95 % nominal, less what 60 draws of the ends cost.
    assert min(inside.values()) >= 50


def test_perfect_class_probabilities_lie_in_the_range() -> None:
    inside = dict.fromkeys(CLASSWISE, 0)
    for seed in range(80):
        p, y = classes(seed)
        bins = run(class_bins(4), [{"probs": p, "y": y}])
        made = perfect_class_ranges(p, CLASSWISE, n_sim=60, seed=seed)
        for name, figure in CLASSWISE.items():
            inside[name] += made[name][0] <= figure(bins) <= made[name][1]
    assert min(inside.values()) >= 67


def test_others_lie_above_it() -> None:
    c, right = confidences(0, 3.0)
    made = perfect_ranges(c, {k: _of(f, c) for k, f in FIGURES.items()}, n_sim=50)
    for name, figure in FIGURES.items():
        assert figure(c, right) > made[name][1]
    p, y = classes(0, 3.0)
    bins = run(class_bins(4), [{"probs": p, "y": y}])
    for name, (_, high) in perfect_class_ranges(p, CLASSWISE, n_sim=50).items():
        assert CLASSWISE[name](bins) > high


def test_labels_are_drawn_from_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.array([[0.2, 0.0, 0.8], [1.0, 0.0, 0.0]])
    seen: list[I64] = []
    perfect_class_ranges(p, {"": lambda b: float(seen.append(b.hits) or 0)}, n_sim=2000)
    hits = np.array(seen)
    assert (hits.sum(axis=(1, 2)) == 2).all()
    assert hits[:, 1].sum() == 0  # a probability of 0 never comes
    assert (hits[:, 0, -1] == 1).all()  # and one of 1 always does
    assert hits[:, 0, 3].mean() == pytest.approx(0.2, abs=0.03)
    p, _ = classes(1)
    whole = perfect_class_ranges(p, CLASSWISE, n_sim=300)
    monkeypatch.setattr("calibration.metrics.perfect._BLOCK", 300 * 7)
    pieces = perfect_class_ranges(p, CLASSWISE, n_sim=300)
    for name, ends in whole.items():
        assert pieces[name] == pytest.approx(ends, rel=0.15)


def test_perfect_error_bars_lie_in_the_range_of_ence() -> None:
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        variance = rng.gamma(2, 1, (300, 2))
        low, high = perfect_ence(variance, n_sim=60, seed=seed)
        error = variance * rng.standard_normal((300, 2)) ** 2
        inside += low <= expected_normalised_calibration_error(error, variance) <= high
        assert expected_normalised_calibration_error(error, 3 * variance) > high
    assert inside >= 85
    for bad, message in ((np.zeros(0), "at least one row"), (np.array([1, np.nan]), "not finite")):
        with pytest.raises(DataError, match=message):
            perfect_ence(bad)


def test_certainty_leaves_no_luck_and_nothing_is_refused() -> None:
    c = np.ones(20)
    assert perfect_ranges(c, {"ks": _of(ks_error, c)}, n_sim=10) == {"ks": (0, 0)}
    assert perfect_class_ranges(np.eye(3), CLASSWISE, n_sim=10)["static"] == (0, 0)
    with pytest.raises(DataError, match="at least 1 row"):
        perfect_ranges(np.zeros(0), {})
    with pytest.raises(DataError, match="at least one row"):
        perfect_class_ranges(np.zeros((0, 3)), {})
    with pytest.raises(DataError, match="sum to"):
        perfect_class_ranges(np.ones((2, 3)), {})


def _of(figure, c):  # type: ignore[no-untyped-def]
    return lambda right: figure(c, right)
