"""Ties, rounding, saturation and rows that are too few: never less coverage than was promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calibration.conformal.intervals import INTERVALS, interval_scores
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import Fitted, run_head
from posthoc.contract import Features


def prices(n: int, seed: int) -> Features:
    """A constant answer, and targets on a grid that float32 does not hold."""
    rng = np.random.default_rng(seed)
    y = 12.3 + 0.1 * rng.integers(-5, 6, (n, 1))
    return Features(None, np.full((n, 1), 12.35, np.float32), y)


def counts(n: int, seed: int) -> Features:
    """Whole numbers that answer for whole numbers."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 200, (n, 1))
    return Features(None, z.astype(np.float32), z + rng.integers(-3, 4, (n, 1)).astype(np.float64))


def fitted(rows: Any, n: int = 400, **options: Any) -> Fitted:
    asked = {"method": "none", "ood": "none", "max_error": None, **options}
    parts = Parts(rows(300, 1), rows(400, 2), rows(n, 3))
    return fit_head(None, parts, FitOptions(**asked))


@pytest.mark.parametrize("method", INTERVALS)
@pytest.mark.parametrize("side", ["two", "lower", "upper"])
@pytest.mark.parametrize("rows", [prices, counts])
def test_targets_that_tie_at_an_end_are_inside(rows: Any, method: str, side: Any) -> None:
    """A tenth of the rows may lie on an end exactly; float32 must not round it past all of them."""
    test = rows(1000, 4)
    for alpha in (0.1, 0.3, 0.4):
        done = fitted(rows, task="regression", conformal=method, side=side, alphas=(alpha,))
        out = run_head(done.head, test)
        score = interval_scores(done.head.interval, test.y, out["mean"], out["std"])
        inside = (out["lower"] <= test.y) & (test.y <= out["upper"])
        covered = score <= done.head.q_hat
        assert inside[:, 0][covered].all()
        assert covered.mean() > 1 - alpha - 0.06


@pytest.mark.parametrize("rows", [prices, counts])
def test_targets_that_tie_at_a_quantile_are_below_it(rows: Any) -> None:
    done, test = fitted(rows, task="regression"), rows(2000, 4)
    q = run_head(done.head, test)["quantiles"]
    below = (test.y[:, :, None] <= q).mean((0, 1))
    assert (below > np.asarray([0.05, 0.25, 0.5, 0.75, 0.95]) - 0.06).all()
