"""A window in which something changed: the older half of its rows is unlike the newer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from calibration.renew.halves import CHANCE, LITTLE, halves
from calibration.renew.renewal import summary
from calibration.renew.rows import PARTS, Labelled, divided
from calibration.renew.write import write_renewed
from posthoc.contract import Task
from tests.calibration.renewals import (
    AS_FITTED,
    SHIFTED,
    TASKS,
    bundles,
    covered,
    renewed,
    served,
    truth,
)
from tests.factory import rows

__all__ = ["bundles"]
N = 4000


def changed(bundle: Path, task: Task, before: float, after: float, share: float) -> Labelled:
    """N rows in order of time, the first ``share`` of which have the spread ``before``."""
    x, _ = rows(task, N, 50)
    old, new = (truth(task, x, spread, 60) for spread in (before, after))
    late = np.arange(N) >= share * N
    return served(bundle, x, np.where(late.reshape(-1, *[1] * (old.ndim - 1)), new, old))


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_before_are_noticed(bundles: dict[Task, Path], tmp_path: Path, task: Task) -> None:
    mixed = changed(bundles[task], task, AS_FITTED[task], SHIFTED[task], share=0.4)
    found = renewed(bundles[task], mixed)
    assert found.halves is not None and found.halves.unlike
    assert found.notes[0].startswith("Renewed on rows whose older half is unlike the newer")
    new = write_renewed(found, tmp_path / "new", "2")
    assert new.manifest.notes.count(found.notes[0]) == 1
    # What it says of the newer half is what becomes of rows that come, and not what is promised.
    first, whole = found.halves.newer[0], found.comparison.after.levels[0]
    assert first.coverage < whole.coverage < found.halves.older[0].coverage
    share = covered(new.path, task, SHIFTED[task])
    assert binomtest(round(first.coverage * first.n), first.n, share).pvalue > 0.001
    assert f"{first.coverage:.4f} of the newer" in found.notes[0]
    assert summary(found)["halves"]["unlike"] is True


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_one_kind_are_not_spoken_of(bundles: dict[Task, Path], task: Task) -> None:
    alike = changed(bundles[task], task, SHIFTED[task], SHIFTED[task], share=0.5)
    found = renewed(bundles[task], alike)
    assert found.halves is not None and not found.halves.unlike
    assert not any("unlike" in note for note in found.notes)


@pytest.mark.parametrize("task", TASKS)
def test_alike_rows_are_called_unlike_as_seldom_as_it_says(
    bundles: dict[Task, Path], task: Task
) -> None:
    """Times that say nothing of a row: p-values are uniform, or larger where scores tie."""
    whole = changed(bundles[task], task, SHIFTED[task], SHIFTED[task], share=0.5)
    found = renewed(bundles[task], whole)
    one, other = found.conformal.take(slice(0, 800)), found.conformal.take(slice(800, 1600))
    pvalues = []
    for seed in range(300):
        times = np.random.default_rng(seed).permutation(1600).astype(np.float64)
        parts = (
            dataclasses.replace(p, time=times[i * 800 :][: len(p)])
            for i, p in enumerate((one, other))
        )
        by_time = halves(found.made, *parts, 0)
        assert by_time is not None
        pvalues.append(by_time.pvalue)
    for level in (CHANCE, 0.05, 0.2):
        n = sum(p < level for p in pvalues)
        assert binomtest(n, 300, level, "greater").pvalue > 0.001, (level, n)


def test_the_distance_is_the_largest_difference_of_coverage_at_one_threshold(
    bundles: dict[Task, Path],
) -> None:
    mixed = changed(bundles["regression"], "regression", 0.3, 0.6, share=0.4)
    found = renewed(bundles["regression"], mixed)
    parts = divided(mixed, PARTS, 0)
    t = found.factor.value if found.factor is not None else 1.0
    scores, times = [], []
    for name in ("conformal", "measured"):
        y, mean, std, time = (
            np.asarray(getattr(parts[name], of)) for of in ("y", "mean", "std", "time")
        )
        scores.extend(np.abs(y - mean)[:, 0] / (std[:, 0] * t))
        times.extend(time)
    older = [s for s, when in zip(scores, times, strict=True) if when <= np.median(times)]
    newer = [s for s, when in zip(scores, times, strict=True) if when > np.median(times)]
    gaps = [np.mean(np.array(older) <= q) - np.mean(np.array(newer) <= q) for q in (*older, *newer)]
    assert found.halves is not None
    assert found.halves.distance == pytest.approx(np.max(np.abs(gaps)), abs=2e-3)
    assert found.halves.distance > LITTLE


def test_too_few_rows_of_a_half_and_rows_without_a_time_say_nothing(
    bundles: dict[Task, Path],
) -> None:
    whole = changed(bundles["regression"], "regression", 0.3, 0.6, share=0.4)
    assert renewed(bundles["regression"], dataclasses.replace(whole, time=None)).halves is None
    one = np.zeros(N)  # all of one time, as a bulk import may have them
    assert renewed(bundles["regression"], dataclasses.replace(whole, time=one)).halves is None
    assert renewed(bundles["regression"], whole.take(slice(0, 500))).halves is None
