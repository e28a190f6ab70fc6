"""The benchmark of folds at a tiny size: every figure is there, and folds do not grow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import folds
from posthoc.folds import run

SOME = ("brier_parts", "smooth_ece", "ranking_histogram", "exact_ranking", "sharpness")


@pytest.mark.parametrize("name", sorted(folds.FOLDS))
def test_every_fold_takes_its_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "BATCH", 400)
    fold, batches = folds.FOLDS[name]()
    a, b = (fold.update(fold.init(), batch) for batch in batches[:2])
    merged, whole = fold.result(fold.merge(a, b)), run(fold, batches[:2])
    assert len(batches) == folds.CYCLE
    assert type(merged) is type(whole)


@pytest.mark.long
def test_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    found = folds.measured(400_000, 5_000, SOME)
    assert set(found["folds"]) == set(SOME) - {"exact_ranking"}
    for record in found["folds"].values():
        assert record["rows_per_second"] > 0
    assert found["constant_memory"]
    total = sum(r["seconds"] for r in found["folds"].values())
    assert found["seconds_10m_rows"] == pytest.approx(25 * total)
    assert found["exact_ranking"]["bytes_per_row"] == 8
    assert found["pvalue_seconds"] > 0 and found["quantile_seconds"] > 0
    assert found["thresholds"]["all"]["scores"] == 400_000
    assert set(found["thresholds"]["all"]["quantile"]) == {"sort", "partition", "two_passes"}
    json.dumps(found)
    assert "smooth_ece" in capsys.readouterr().err


def test_what_grows_is_seen() -> None:
    found = folds._alone(folds._fold, "exact_ranking", 4_000_000)
    # 8 bytes for each row more, less what the process had freed before and takes again.
    assert found["peak_mb"] - found["peak_mb_tenth"] > 0.6 * 8 * 3.6


def test_drawn_batches_are_what_the_folds_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "BATCH", 300)
    drawn = folds._classes(0)
    np.testing.assert_allclose(drawn["probs"].sum(axis=1), 1, atol=1e-5)
    assert 0 < drawn["right"].mean() < 1 and 0 < drawn["covered"].mean() < 1
    np.testing.assert_array_equal(folds._classes(0)["y"], drawn["y"])
