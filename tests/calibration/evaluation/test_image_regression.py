"""The evaluation of maps of values against scipy, scikit-learn and slow loops over pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, pearsonr, spearmanr

from calibration.evaluation.image_regression import ImageRegression, Mapped
from calibration.evaluation.records import Evaluation
from posthoc.contract import DataError

N, P, K = 10, 50, 2
CONSTANT = 0.8
Q = (0.1, 0.5, 0.9)


def block(seed: int = 0, **more: Any) -> Mapped:
    """Gaussian maps whose standard deviation is known; a tenth of the pixels has no truth."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(0, 2, (N, P, K)).astype(np.float32)
    std = rng.gamma(3, 0.3, (N, P, K)).astype(np.float32)
    y = mean + std * rng.standard_normal((N, P, K))
    y[rng.random((N, P)) < 0.1, 1] = np.nan
    given: dict[str, Any] = {
        "mean": {"constant error bar": mean, "hedged": mean},
        "std": {"constant error bar": np.broadcast_to(CONSTANT, mean.shape), "hedged": std},
        "half": {0.1: 1.9, 0.3: 1.2},
        "y": y,
        "keys": np.arange(N).astype(np.uint64),
        "groups": np.arange(N).astype(np.uint64),
        "quantiles": mean[..., None] + std[..., None] * norm.ppf(Q).astype(np.float32),
        "scores": {"hedged": rng.normal(size=(N, P))},
        "held": rng.random((N, P)) < 0.2,
    }
    return Mapped(**(given | more))


def evaluated(b: Mapped, data_range: float | None = None, **more: Any) -> Evaluation:
    made = ImageRegression(tuple(b.half), quantile_levels=Q, data_range=data_range)
    made.add(b)
    return made.result(**({"n_conformal": 60, "n_boot": 100} | more))


def images(b: Mapped) -> list[np.ndarray]:
    """Masks of the pixels whose truth is known."""
    return [np.isfinite(b.y[i]).all(1) for i in range(N)]


def crps(error: float, std: float) -> float:
    w = error / std
    return std * (w * (2 * norm.cdf(w) - 1) + 2 * norm.pdf(w) - 1 / math.sqrt(math.pi))


def test_means_over_images() -> None:
    b = block()
    found = evaluated(b, data_range=10.0)
    assert found.n == N and found.dense is not None
    assert found.dense.pixels == sum(k.sum() for k in images(b))
    for s in found.systems:
        want: dict[str, list[float]] = {}
        for i, k in enumerate(images(b)):
            mean, std, y = b.mean[s.name][i][k], b.std[s.name][i][k], b.y[i][k]
            error = (y - mean).astype(np.float64)
            mse = (error**2).mean()
            one = {
                "mse": mse,
                "mae": np.abs(error).mean(),
                "psnr": 10 * math.log10(100 / mse),
                "nll": -norm.logpdf(y, mean, std).mean(),
                "crps": np.mean([crps(e, d) for e, d in zip(error.flat, std.flat, strict=True)]),
            }
            if s.name == "hedged":
                one["pearson"] = pearsonr(np.abs(error).ravel(), std.ravel())[0]
                one["spearman"] = spearmanr(np.abs(error).ravel(), std.ravel())[0]
            for name, value in one.items():
                want.setdefault(name, []).append(value)
        assert s.metrics["rmse"].value == pytest.approx(math.sqrt(np.mean(want.pop("mse"))))
        for name, values in want.items():
            assert s.metrics[name].value == pytest.approx(np.mean(values), rel=1e-5), name
            low, high = s.metrics[name].low, s.metrics[name].high
            assert low is not None and high is not None and low < np.mean(values) < high
    assert "pearson" not in found.systems[0].metrics  # one error bar for all has none
    assert "psnr" not in evaluated(b).systems[0].metrics


def test_sparsification_by_a_slow_loop() -> None:
    b = block()
    found = evaluated(b)
    areas = []
    for i, k in enumerate(images(b)):
        error = np.abs(b.y[i][k] - b.mean["hedged"][i][k]).ravel()
        curves = []
        for by in (b.std["hedged"][i][k].ravel(), error):
            left = error[np.argsort(-by, kind="stable")]
            curves.append([left[j:].mean() / error.mean() for j in range(len(left))])
        areas.append(np.mean(curves[0]) - np.mean(curves[1]))
    hedged, constant = found.systems[1].metrics, found.systems[0].metrics
    assert hedged["ause"].value == pytest.approx(np.mean(areas), rel=1e-6)
    assert constant["ause"].value == pytest.approx(constant["ause_random"].value)
    assert hedged["ause"].value < hedged["ause_random"].value
    assert found.dense is not None
    (curve,) = found.dense.sparsification
    assert curve.y[0] == pytest.approx(1) and len(curve.x) == len(curve.oracle) == 100


def test_uncovered_pixels_are_of_all_outputs_jointly() -> None:
    b = block()
    found = evaluated(b)
    for level in found.levels:
        shares, widths = [], []
        for i, k in enumerate(images(b)):
            outside = 0
            for p in np.flatnonzero(k):
                mean, std, y = b.mean["hedged"][i, p], b.std["hedged"][i, p], b.y[i, p]
                reach = b.half[level.alpha] * std
                outside += bool((np.abs(y - mean) > reach).any())
            shares.append(outside / k.sum())
            widths.append(2 * b.half[level.alpha] * b.std["hedged"][i][k].mean())
        assert level.images is not None and level.images.ambiguous is None
        assert level.coverage == pytest.approx(1 - np.mean(shares))
        assert level.mean_size == pytest.approx(np.mean(widths), rel=1e-5)
        assert level.images.above.value == np.mean([s > level.alpha for s in shares])
    assert sum(g.count for g in found.width_groups) == sum(k.sum() for k in images(b))
    assert found.widths is not None and found.widths.name == "width at level 0.9"


def test_figures_of_all_pixels() -> None:
    b = block()
    found = evaluated(b)
    k = np.stack(images(b))
    mean, std, y = b.mean["hedged"][k], b.std["hedged"][k], b.y[k]
    assert found.quantiles is not None
    assert b.quantiles is not None
    below = [(y <= b.quantiles[k][..., q]).mean() for q in range(len(Q))]
    np.testing.assert_allclose(found.quantiles.observed, below)
    hedged = found.systems[1]
    size = np.abs(y - mean).ravel()
    pooled = pearsonr(size, std.ravel())[0]
    assert hedged.metrics["pearson_pooled"].value == pytest.approx(pooled, rel=1e-6)
    assert hedged.pit is not None
    pit, _ = np.histogram(norm.cdf((y - mean) / std), 20, (0, 1))
    np.testing.assert_array_equal(hedged.pit, pit)
    assert found.pce_floor is None  # no honest one for dependent pixels
    assert found.dense is not None
    bins = {v.name: v for v in found.dense.variance}
    own = bins["hedged"]
    edges = np.array(own.upper)
    index = np.searchsorted(edges, (std.astype(np.float64) ** 2).ravel())
    gap = 0.0
    for at in range(len(edges)):
        inside = index == at
        assert own.count[at] == inside.sum()
        squares, variance = (
            (size[inside] ** 2).sum(),
            (std.ravel()[inside].astype(float) ** 2).sum(),
        )
        assert own.squared_error[at] == pytest.approx(squares / inside.sum())
        gap += abs(squares - variance)
    assert hedged.metrics["uce"].value == pytest.approx(gap / size.size)
    flat = abs((size**2).mean() - CONSTANT**2)
    assert found.systems[0].metrics["uce"].value == pytest.approx(flat)
    assert hedged.metrics["uce"].value < flat + 0.2


def test_answered_pixels() -> None:
    b = block()
    found = evaluated(b).answered
    k = np.stack(images(b))
    assert b.held is not None and found is not None
    assert found.share == pytest.approx((k & ~b.held).sum() / k.sum())
    assert found.error is None and found.level == "0.9"


def test_infinite_intervals() -> None:
    found = evaluated(block(half={0.01: math.inf, 0.3: 1.2}), everything=[0.01])
    first, second = found.levels
    assert first.coverage == 1 and first.mean_size is None and first.band_low == 1
    assert second.mean_size is not None
    assert found.widths is not None and found.widths.name == "width at level 0.7"
    none = evaluated(block(half={0.01: math.inf}))
    assert none.widths is None and none.width_groups == ()


def test_an_image_without_error_has_no_ratio() -> None:
    b = block()
    y = b.y.copy()
    y[3] = b.mean["hedged"][3]
    found = evaluated(block(y=y), data_range=1.0)
    assert math.isfinite(found.systems[1].metrics["psnr"].value)


def test_what_cannot_be_is_refused() -> None:
    b = block()
    b.y[4] = np.nan
    with pytest.raises(DataError, match="image 4 has no pixel with a truth"):
        evaluated(b)
    with pytest.raises(DataError, match="above 0"):
        ImageRegression((0.1,), data_range=0.0)
