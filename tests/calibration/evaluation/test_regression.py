"""The evaluation of a regressor against scikit-learn, scipy and its own intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from calibration.evaluation import Evaluation
from calibration.evaluation.parts import Named
from calibration.metrics.coverage import coverage_band
from posthoc.contract import DataError
from tests.calibration import simulated


@pytest.mark.parametrize("k", [1, 3])
def test_figures(k: int) -> None:
    rng = np.random.default_rng(5)
    mean, std = rng.normal(0, 3, (800, k)), rng.gamma(2, 1, (800, k))
    y = mean + std * rng.standard_normal((800, k))
    got = simulated.regression(
        n=800,
        k=k,
        y=y,
        fields={"mean": mean, "std": std},
        constant_std=np.full(k, 2.0),
        intervals={0.1: (mean - 2 * std, mean + 2 * std)},
        ood_in=None,
        ood_out=None,
    )
    constant, hedged = (s.metrics for s in got.systems)
    assert hedged["rmse"].value == pytest.approx(root_mean_squared_error(y.ravel(), mean.ravel()))
    assert hedged["mae"].value == pytest.approx(mean_absolute_error(y, mean))
    assert hedged["nll"].value == pytest.approx(-norm.logpdf(y, mean, std).mean())
    assert constant["nll"].value == pytest.approx(-norm.logpdf(y, mean, 2.0).mean())
    assert got.levels[0].coverage == pytest.approx((np.abs(y - mean) <= 2 * std).all(axis=1).mean())
    assert got.levels[0].mean_size == pytest.approx(4 * std.mean())
    assert got.systems[1].pit is not None and sum(got.systems[1].pit) == 800 * k


def test_the_true_model_beats_one_error_bar_and_is_flat() -> None:
    got = simulated.regression()
    gain = {d.metric: d for d in got.differences}
    assert gain["nll"].high < 0 and gain["crps"].high < 0
    constant, hedged = (s.metrics for s in got.systems)
    assert hedged["rmse"] == constant["rmse"]
    assert got.pce_floor is not None
    assert hedged["pce"].value < 3 * got.pce_floor < constant["pce"].value
    for level in got.levels:
        assert level.band_low <= level.coverage <= level.band_high
    assert got.quantiles is not None
    np.testing.assert_allclose(got.quantiles.observed, got.quantiles.level, atol=0.04)
    widths = [g.mean_width for g in got.width_groups]
    assert widths == sorted(widths) and sum(g.count for g in got.width_groups) == got.n
    assert Evaluation.model_validate_json(got.model_dump_json()) == got


def test_without_a_baseline_and_with_infinite_intervals() -> None:
    n = 200
    infinite = np.full((n, 1), np.inf)
    got = simulated.regression(
        n=n, constant_std=None, intervals={0.001: (-infinite, infinite)}, n_conformal=50
    )
    assert [s.name for s in got.systems] == ["hedged"] and got.differences == ()
    assert got.levels[0].coverage == 1 and got.levels[0].mean_size is None
    assert got.levels[0].interval_score is None
    assert got.widths is None and got.width_groups == ()


def test_rows_that_do_not_match_are_named() -> None:
    with pytest.raises(DataError, match=r"upper at alpha 0\.1 has 3 rows"):
        simulated.regression(n=50, intervals={0.1: (np.zeros((50, 1)), np.zeros((3, 1)))})
    with pytest.raises(DataError, match="shape"):
        simulated.regression(n=50, y=np.zeros((50, 1, 1)))


def test_interval_scores_sharpness_and_calibrated_error_bars() -> None:
    got = simulated.regression(k=2)
    constant, hedged = (s.metrics for s in got.systems)
    for name in ("pce", "ence"):
        assert hedged[name].range == "perfect"
        assert hedged[name].value < 1.2 * hedged[name].high
    assert constant["pce"].value > 2 * constant["pce"].high
    rng = np.random.default_rng(0)
    std = rng.gamma(3.0, 0.5, (4000, 2))
    mean = rng.normal(0, 10, (4000, 2))
    y = (mean + std * rng.standard_normal((4000, 2)))[2000:]
    assert hedged["sharpness"].value == pytest.approx(std[2000:].mean())
    assert hedged["sharpness"].low < hedged["sharpness"].value < hedged["sharpness"].high
    assert constant["sharpness"].low == pytest.approx(constant["sharpness"].high)
    low, high = y - 1.0, y + 2.0
    low[::10] = y[::10] + 0.5  # a tenth of the targets lies half a unit below its interval
    alone = simulated.regression(k=2, intervals={0.1: (low, high)})
    score = alone.levels[0].interval_score
    assert score is not None
    assert score.value == pytest.approx(0.9 * 3 + 0.1 * (1.5 + 20 * 0.5))
    assert score.low < score.value < score.high


def test_parts_of_the_rows() -> None:
    names = np.where(np.arange(2000) % 4 == 0, "a", "b")
    got = simulated.regression(named=Named(names, {}))
    for i, level in enumerate(got.levels):
        parts = {p.name: p for p in level.groups}
        assert {k: p.n for k, p in parts.items()} == {"a": 500, "b": 1500}
        whole = sum(p.n * p.coverage for p in parts.values()) / 2000
        assert whole == pytest.approx(level.coverage)
        ends = coverage_band(2000, 500, level.alpha)
        assert (parts["a"].band_low, parts["a"].band_high) == ends
        assert (level.worst_slice is not None) == (i == 0)
        assert level.size_violation is None


def test_error_bars_of_zero_have_no_relative_error() -> None:
    n = 300
    fields = {"mean": np.zeros((n, 1)), "std": np.zeros((n, 1))}
    got = simulated.regression(n=n, fields=fields, intervals={}, constant_std=None)
    assert "ence" not in got.systems[0].metrics
    assert got.systems[0].metrics["sharpness"].value == 0
