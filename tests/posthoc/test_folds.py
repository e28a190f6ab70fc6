"""Folds against whole-array numpy; log losses against scipy, torch and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss

from posthoc.contract import DataError
from posthoc.folds import (
    PROBABILITY_FLOOR,
    Fold,
    class_index,
    log_loss,
    log_loss_of_probs,
    log_softmax,
    run,
)

modest = settings(deadline=None, derandomize=True, max_examples=40)


def test_run_draws_one_batch_after_the_other() -> None:
    seen: list[int] = []

    def batches() -> object:
        for i in range(3):
            assert len(seen) == i  # the batch before was folded in before this one is made
            yield i

    def update(state: int, batch: int) -> int:
        seen.append(batch)
        return state + batch

    fold: Fold[int, int, str] = Fold(lambda: 0, update, lambda a, b: a + b, str)
    assert run(fold, batches()) == "3"  # type: ignore[arg-type]
    assert run(fold, []) == "0"


@modest
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    kind=st.sampled_from(["scalar", "row", "entry"]),
)
def test_log_loss_is_torch_cross_entropy(seed: int, scale: float, kind: str) -> None:
    rng = np.random.default_rng(seed)
    z, y = scale * rng.standard_normal((20, 5)), rng.integers(0, 5, 20)
    shape = {"scalar": (), "row": (20,), "entry": (20, 5)}[kind]
    t = rng.uniform(0.2, 5, shape)
    scaled = z / (t[:, None] if kind == "row" else t)
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(scaled), torch.from_numpy(y), reduction="none"
    )
    got = log_loss(z, y, temperature=t if shape else float(t))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-12, atol=1e-12)


def test_log_softmax_holds_at_extremes_in_every_float_type() -> None:
    z = np.array([[6e4, 0.0, -6e4], [0.0, 0.0, 0.0]])
    for dtype in (np.float16, np.float32, np.float64):
        got = log_softmax(z.astype(dtype))
        assert got.dtype == np.float64
        np.testing.assert_allclose(np.exp(got).sum(axis=1), 1)
        np.testing.assert_allclose(got[1], -np.log(3))


def test_log_loss_of_probs_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 300)
    y = rng.integers(0, 4, 300)
    want = sklearn_log_loss(y, p, labels=[0, 1, 2, 3])
    assert log_loss_of_probs(p, y).mean() == pytest.approx(want, abs=1e-12)


def test_an_impossible_truth_costs_the_floor_and_no_more() -> None:
    p = np.array([[0.0, 1.0]], dtype=np.float32)
    assert log_loss_of_probs(p, np.array([0]))[0] == pytest.approx(87.3365, abs=1e-3)
    assert log_loss_of_probs(p, np.array([1]))[0] == 0
    assert np.float32(PROBABILITY_FLOOR) > 0


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([0, -1, 1]), "row 1: label -1"),
        (np.array([0, 1, 2]), "row 2: label 2"),
        (np.array([0.0, 1.0, 1.0]), "not float64"),
        (np.array([[0], [1], [1]]), r"shape \(3, 1\)"),
    ],
)
def test_labels_that_are_no_class_are_named(y: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_index(y, 2)
    with pytest.raises(DataError, match=message):
        log_loss(np.zeros((3, 2)), y)
