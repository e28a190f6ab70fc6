"""What is called better, what worse, and where chance has coverage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.bundle import threshold_at
from calibration.metrics.coverage import coverage_band
from calibration.renew.measure import Figures, Level, band, compare, losses
from calibration.renew.rows import Labelled
from posthoc.contract import Array


def classes(p: float, n: int = 400) -> Labelled:
    """n rows of which three in four are right, all of confidence p."""
    keys = np.arange(n).astype(np.uint64)
    probs = np.tile(np.asarray([[p, 1 - p]], np.float32), (n, 1))
    y = (np.arange(n) % 4 == 0).astype(np.int64)
    zeros = np.zeros(n, np.int64)
    return Labelled(keys, y, zeros, label=zeros, probs=probs, confidence=probs[:, 0])


def figures(*inside: bool) -> Figures:
    levels = [Level("0.9", 400, 0.9 if i else 0.7, 0.85, 0.95, i, 1.0) for i in inside]
    return Figures({}, tuple(levels))


@pytest.mark.parametrize(
    ("before", "after", "sets", "better", "worse"),
    [
        (0.99, 0.75, (True, True), True, False),
        (0.75, 0.99, (True, True), False, True),
        (0.75, 0.75, (True, True), False, False),
        (0.75, 0.75, (False, True), True, False),
        (0.75, 0.75, (False, False), False, False),
        (0.99, 0.75, (True, False), True, True),
        (0.75, 0.99, (False, True), True, True),
        (0.99, 0.75, (False, False), True, False),
    ],
)
def test_better_in_something_and_worse_in_nothing(
    before: float, after: float, sets: tuple[bool, bool], better: bool, worse: bool
) -> None:
    old, new = classes(before), classes(after)
    found = compare(figures(sets[0]), figures(sets[1]), old, new, seed=0)
    assert (bool(found.better), bool(found.worse)) == (better, worse)
    assert found.publish == (better and not worse)
    assert found.as_dict()["publish"] == found.publish


def test_a_difference_within_luck_is_neither() -> None:
    """The better probability for these rows is .75; .74 and .76 lie too near to be told apart."""
    found = compare(figures(True), figures(True), classes(0.76), classes(0.75), seed=0)
    assert found.difference.low < 0 < found.difference.high
    assert not found.better and not found.worse


def test_losses_by_definition() -> None:
    rows = classes(0.8, 8)
    want = [-np.log(0.2 if y else 0.8) for y in rows.y]
    np.testing.assert_allclose(losses(rows), want, rtol=1e-6)
    rng = np.random.default_rng(0)
    mean, std, y = rng.normal(size=(50, 2)), rng.uniform(1, 2, (50, 2)), rng.normal(size=(50, 2))
    none = np.zeros(50, np.int64)
    found = losses(Labelled(none, y, none, mean=mean, std=std))
    draws = mean + std * rng.normal(size=(20_000, 50, 2))  # CRPS = E|X - y| - E|X - X'| / 2
    crps = abs(draws - y).mean(0) - abs(draws - draws[::-1]).mean(0) / 2
    np.testing.assert_allclose(found, crps.mean(1), atol=0.02)


@pytest.mark.parametrize("n", [7, 200, 900])
def test_without_ties_the_band_is_that_of_the_rank(n: int) -> None:
    scores = np.sort(np.random.default_rng(n).normal(size=n))
    for alpha in (0.1, 0.3):
        assert band(scores, 500, alpha, 0.99) == coverage_band(n, 500, alpha, level=0.99)


def discrete(rng: np.random.Generator, n: int, kind: str) -> Array:
    if kind == "ranks":
        return rng.choice([1.0, 2.0, 3.0], n, p=[0.6, 0.35, 0.05])
    return np.where(rng.random(n) < 0.3, 0.0, -rng.random(n))  # a third at the largest score


@pytest.mark.parametrize("kind", ["ranks", "edge"])
def test_the_band_holds_for_scores_that_tie(kind: str) -> None:
    rng = np.random.default_rng(0)
    inside, above = 0, 0
    for _ in range(400):
        scores = np.sort(discrete(rng, 300, kind))
        low, high = band(scores, 400, 0.2, 0.99)
        covered = (discrete(rng, 400, kind) <= threshold_at(scores, 0.2)).mean()
        inside += low <= covered <= high
        above += covered > coverage_band(300, 400, 0.2)[1]
    assert inside >= 0.98 * 400
    assert above > 0.9 * 400  # ties cover more than the rank says


def test_levels_of_infinite_size_are_plain_json() -> None:
    level = replace(figures(True).levels[0], size=None)
    assert Figures({"nll": 1.0}, (level,)).as_dict()["levels"][0]["size"] is None
