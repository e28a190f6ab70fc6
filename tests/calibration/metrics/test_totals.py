"""The additive statistics against slow definitions, scikit-learn and torchmetrics."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from calibration.metrics.totals import (
    BIN_LABELS,
    N_BINS,
    ClassificationTotals,
    RegressionTotals,
    bin_index,
    classification_totals,
    level_name,
    merge,
    regression_totals,
    update_classification,
    update_level,
    update_regression,
)
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=40)


def classified(n: int, c: int, seed: int) -> dict[str, Any]:
    """A batch of n rows; probabilities are float32 as the graph gives them."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(c, 0.3), n).astype(np.float32)
    label = probs.argmax(axis=1)
    return {
        "confidence": probs.max(axis=1),
        "label": label,
        "y": np.where(rng.random(n) < 0.6, label, rng.integers(0, c, n)),
        "probs": probs,
        "covered": rng.random(n) < 0.9,
        "level": rng.choice(["0.9", "0.95"], n),
        "set_size": rng.integers(0, c, n),
    }


def regressed(n: int, k: int, seed: int) -> dict[str, Any]:
    """A batch of n rows and k outputs."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(5, 3, (n, k)), rng.gamma(2, 1, (n, k)) + 0.01
    return {
        "mean": mean,
        "std": std,
        "y": mean + std * rng.standard_normal((n, k)),
        "lower": mean - 1.6 * std,
        "upper": mean + 1.6 * std,
        "level": rng.choice(["0.9", "0.8"], n),
    }


def rows(batch: dict[str, Any], index: Any) -> dict[str, Any]:
    return {k: v[index] for k, v in batch.items()}


def close(a: Any, b: Any) -> None:
    """Every sum of two totals agrees to 1e-12."""
    for name in a.__dataclass_fields__:
        if name != "levels":
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)
    assert set(a.levels) == set(b.levels)
    for name, level in a.levels.items():
        assert level.labeled == b.levels[name].labeled
        assert level.covered == b.levels[name].covered
        assert level.size_sum == pytest.approx(b.levels[name].size_sum, rel=1e-12)


@modest
@given(
    n=st.integers(0, 40), seed=st.integers(0, 10_000), cut=st.floats(0, 1), regression=st.booleans()
)
def test_split_merge_and_order_do_not_matter(
    n: int, seed: int, cut: float, regression: bool
) -> None:
    fold: Any = regression_totals if regression else classification_totals
    batch = regressed(n, 2, seed) if regression else classified(n, 5, seed)
    whole = fold.update(fold.init(), batch)
    k = round(cut * n)
    a = fold.update(fold.init(), rows(batch, slice(0, k)))
    b = fold.update(fold.init(), rows(batch, slice(k, n)))
    shuffled = rows(batch, np.random.default_rng(seed).permutation(n))
    close(merge(a, b), whole)
    close(merge(b, a), whole)
    close(run(fold, [rows(batch, slice(0, k)), rows(batch, slice(k, n))]), whole)
    close(run(fold, [shuffled]), whole)
    close(merge(whole, fold.init()), whole)


@pytest.mark.parametrize(
    ("confidence", "label"),
    [
        (0.0, "0.05"),
        (np.nextafter(0, 1), "0.05"),
        (0.05, "0.05"),
        (np.nextafter(0.05, 1), "0.10"),
        (0.95, "0.95"),
        (np.float32(0.95), "0.95"),  # 0.949999988
        (np.float32(0.15), "0.20"),  # 0.1500000060: right-closed, compared as float64
        (1.0, "1.00"),
        (np.float32(1.0000001), "1.00"),
    ],
)
def test_bins_are_right_closed(confidence: float, label: str) -> None:
    assert BIN_LABELS[bin_index(np.array([confidence]))[0]] == label


@modest
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_bin_is_the_smallest_upper_edge(confidence: list[float]) -> None:
    want = [next(i for i in range(N_BINS) if c <= (i + 1) / N_BINS) for c in confidence]
    assert bin_index(np.array(confidence)).tolist() == want


def test_every_edge_prints_and_parses_as_itself() -> None:
    assert BIN_LABELS[0] == "0.05" and BIN_LABELS[-1] == "1.00"
    assert bin_index(np.array([float(b) for b in BIN_LABELS])).tolist() == list(range(N_BINS))


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_impossible_confidence_names_its_row(bad: float) -> None:
    with pytest.raises(DataError, match="row 2"):
        bin_index(np.array([0.5, 0.5, bad]))


@pytest.mark.parametrize(
    ("alpha", "name"),
    [(0.1, "0.9"), (0.05, "0.95"), (0.01, "0.99"), (0.2, "0.8"), (0.5, "0.5"), (1e-3, "0.999")],
)
def test_level_names(alpha: float, name: str) -> None:
    assert level_name(alpha) == name
    assert level_name(1 - float(name)) == name  # 1 - 0.9 is 0.09999999999999998


def test_level_name_refuses_no_level() -> None:
    for alpha in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="strictly between 0 and 1"):
            level_name(alpha)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 200))
def test_ece_equals_the_slow_loop(seed: int, n: int) -> None:
    batch = classified(n, 3, seed)
    totals = update_classification(ClassificationTotals(), **batch)
    confidence = batch["confidence"].astype(float)
    right = batch["label"] == batch["y"]
    ece = 0.0
    for i in range(N_BINS):
        inside = [j for j in range(n) if i / N_BINS < confidence[j] <= (i + 1) / N_BINS]
        if i == 0:
            inside += [j for j in range(n) if confidence[j] == 0]
        if inside:
            gap = np.mean(right[inside]) - np.mean(confidence[inside])
            ece += len(inside) / n * abs(gap)
    assert totals.ece == pytest.approx(ece, abs=1e-12)
    assert totals.accuracy == pytest.approx(right.mean())
    assert totals.expected_accuracy == pytest.approx(confidence.mean())


@pytest.mark.parametrize(
    ("first", "ece", "in_last"),
    # 0.96 shares the last bin with 1.0 (apart, in a phantom bin, they would give 0.52); 0.95
    # closes the bin before it.
    [(0.96, 0.48, 2), (0.95, 0.525, 1)],
)
def test_a_confidence_of_one_is_in_the_last_bin(first: float, ece: float, in_last: int) -> None:
    totals = update_classification(
        ClassificationTotals(),
        confidence=np.array([first, 1.0]),
        label=np.array([0, 1]),
        y=np.array([0, 0]),
    )
    assert totals.ece == pytest.approx(ece)
    assert totals.count[-1] == in_last


def test_ece_equals_torchmetrics_away_from_its_edges() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 2000)
    confidence = probs.max(axis=1)
    off = np.abs(confidence * N_BINS - np.round(confidence * N_BINS))
    probs = probs[(off > 1e-3) & (confidence < 0.999)]
    y = rng.integers(0, 4, len(probs))
    theirs = MulticlassCalibrationError(num_classes=4, n_bins=N_BINS, norm="l1")
    want = theirs(torch.from_numpy(probs), torch.from_numpy(y))
    totals = update_classification(
        ClassificationTotals(),
        confidence=probs.max(axis=1),
        label=probs.argmax(axis=1),
        y=y,
    )
    assert totals.ece == pytest.approx(float(want), abs=1e-6)


def test_log_loss_and_brier_equal_scikit_learn() -> None:
    batch = classified(500, 4, 0)
    totals = update_classification(ClassificationTotals(), **batch)
    p, y = batch["probs"].astype(float), batch["y"]
    p = np.maximum(p, np.finfo(np.float32).tiny)
    p /= p.sum(axis=1, keepdims=True)
    assert totals.log_loss == pytest.approx(log_loss(y, p, labels=range(4)), rel=1e-6)
    one_hot = sum(brier_score_loss(y == c, p[:, c]) for c in range(4))
    assert totals.brier == pytest.approx(one_hot, rel=1e-6)
    assert totals.scored == 500


def test_rows_without_probs_are_not_scored() -> None:
    batch = classified(30, 4, 0)
    known = update_classification(ClassificationTotals(), **batch)
    plain = {k: batch[k] for k in ("confidence", "label", "y")}
    both = update_classification(known, **plain)
    assert both.n == 60 and both.scored == 30
    assert both.log_loss == known.log_loss and both.brier == known.brier
    assert {k: v.labeled for k, v in both.levels.items()} == {
        k: v.labeled for k, v in known.levels.items()
    }


def test_levels_count_what_each_row_was_given() -> None:
    batch = classified(200, 4, 1)
    totals = update_classification(ClassificationTotals(), **batch)
    for name in ("0.9", "0.95"):
        mine = batch["level"] == name
        level = totals.levels[name]
        assert level.labeled == mine.sum()
        assert totals.coverage(name) == pytest.approx(batch["covered"][mine].mean())
        assert level.mean_size == pytest.approx(batch["set_size"][mine].mean())
    again = update_level(totals, "0.8", covered=batch["covered"], size=batch["set_size"])
    assert again.levels["0.8"].labeled == 200
    assert again.levels["0.9"] == totals.levels["0.9"]


def test_regression_sums_average_over_outputs_and_cover_jointly() -> None:
    batch = regressed(300, 3, 0)
    totals = update_regression(RegressionTotals(), **batch)
    error = batch["y"] - batch["mean"]
    assert totals.n == 300
    assert totals.rmse == pytest.approx(np.sqrt((error**2).mean()))
    assert totals.mae == pytest.approx(np.abs(error).mean())
    covered = [
        all(lo <= t <= hi for lo, t, hi in zip(*r, strict=True))
        for r in zip(batch["lower"], batch["y"], batch["upper"], strict=True)
    ]
    width = (batch["upper"] - batch["lower"]).mean(axis=1)
    for name in ("0.9", "0.8"):
        mine = batch["level"] == name
        assert totals.coverage(name) == pytest.approx(np.array(covered)[mine].mean())
        assert totals.levels[name].mean_size == pytest.approx(width[mine].mean())


def test_one_output_may_come_as_a_column_or_not() -> None:
    batch = regressed(50, 1, 0)
    flat = {k: v[:, 0] if v.ndim == 2 else v for k, v in batch.items()}
    close(
        update_regression(RegressionTotals(), **batch),
        update_regression(RegressionTotals(), **flat),
    )


def test_ratios_of_no_rows_are_nan() -> None:
    for value in (
        ClassificationTotals().ece,
        ClassificationTotals().log_loss,
        ClassificationTotals().coverage("0.9"),
        RegressionTotals().rmse,
        RegressionTotals().coverage("0.9"),
    ):
        assert np.isnan(value)


def test_mismatched_rows_are_refused() -> None:
    batch = classified(10, 3, 0)
    with pytest.raises(DataError, match="y has 9 rows"):
        update_classification(ClassificationTotals(), **(batch | {"y": batch["y"][:9]}))
    with pytest.raises(DataError, match="size has 9 rows"):
        update_classification(
            ClassificationTotals(), **(batch | {"set_size": batch["set_size"][:9]})
        )
    with pytest.raises(DataError, match="together or not at all"):
        update_classification(ClassificationTotals(), **(batch | {"level": None}))
    with pytest.raises(DataError, match="std has shape"):
        update_regression(RegressionTotals(), **(regressed(10, 2, 0) | {"std": np.ones((10, 3))}))
    with pytest.raises(DataError, match="row 0: label 7"):
        update_classification(ClassificationTotals(), **(batch | {"y": np.full(10, 7)}))


def test_memory_of_a_fold_does_not_grow_with_the_rows() -> None:
    def batches(count: int) -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield classified(5000, 4, i)

    def peak(count: int) -> int:
        tracemalloc.start()
        run(classification_totals, batches(count))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(1)  # imports and caches
    assert peak(40) < 1.2 * peak(4)


def test_a_nan_never_reaches_a_sum() -> None:
    rows = {"confidence": [0.5, 0.5], "label": [0, 1], "y": [0, 1]}
    with pytest.raises(DataError, match="row 1: its Brier score is NaN"):
        update_classification(
            ClassificationTotals(),
            **{k: np.array(v) for k, v in rows.items()},
            probs=np.array([[0.5, 0.5], [0.5, np.nan]]),
        )
    good = {k: np.zeros((3, 2)) for k in ("mean", "std", "y", "lower", "upper")}
    for name, message in (
        ("mean", "error"),
        ("y", "error"),
        ("std", "standard deviation"),
        ("lower", "lower bound"),
        ("upper", "upper bound"),
    ):
        bad = good | {name: np.where(np.arange(3)[:, None] == 2, np.nan, good[name])}
        with pytest.raises(DataError, match=f"row 2: its {message} is NaN"):
            update_regression(RegressionTotals(), **bad, level="0.9")
