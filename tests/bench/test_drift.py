"""The bench of drift: its streams are what it says, and its counts are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from bench import drift
from calibration.drift.detector import DEFAULT, DETECTORS, Found, detector


class Scripted:
    """A detector that says what the stream holds: an alarm where a point is 99, learning at 55."""

    def start(self, reference: Any, **settings: Any) -> int:
        assert len(reference) == drift.REFERENCE
        return 0

    def step(self, state: int, x: Any) -> tuple[int, Found]:
        return state + 1, Found(x == 99, 0.0, None, x == 55)


def test_false_alarms_and_finds_are_counted() -> None:
    reference, quiet = np.zeros(drift.REFERENCE), np.zeros(10)
    clean = np.array([0, 99, 55, 55, 0, 0, 99, 0, 0, 0])
    late, at_3, at_30 = (np.zeros(40) for _ in range(3))
    late[30], at_3[2], at_30[29] = 99, 99, 99
    streams = [
        drift.Stream(reference, clean, late),
        drift.Stream(reference, quiet, at_3),
        drift.Stream(reference, quiet, at_30),
    ]
    found = drift.figures(Scripted(), {}, iter(streams), 30)  # type: ignore[arg-type]
    assert found["false_alarms"] == 2 and found["clean_points"] == 28
    assert found["false_alarms_per_1000"] == pytest.approx(2000 / 28)
    assert found["found"] == pytest.approx(2 / 3) and found["median_delay"] == (3 + 30) / 2


@pytest.mark.parametrize("place", range(len(drift.CELLS)))
def test_streams_of_a_cell(place: int) -> None:
    kind, rate = drift.CELLS[place]
    runs = [drift.shifted(place, seed, kind, rate, 200) for seed in range(100)]
    before = np.concatenate([np.r_[s.reference, s.clean] for s in runs])
    after = {sign: np.concatenate([s.changed for s in runs[sign::2]]) for sign in (0, 1)}
    lifted = norm.ppf(0.5 / (1 - rate)) if kind in ("5", "10") else 0.0  # by outliers above
    assert np.median(before) == pytest.approx(lifted, abs=0.03)
    assert np.median(after[1]) == pytest.approx(2 + lifted, abs=0.12)
    assert np.median(after[0]) == pytest.approx(-2 + lifted, abs=0.12)
    far = {"none": np.abs(before) > 9, "5": before == 5.0, "10": before == 10.0}.get(
        kind, np.abs(before) > 4
    )
    share = 0.689 if kind.startswith("N") else 1.0  # P(|N(0, 10²)| > 4)
    assert far.mean() == pytest.approx(rate * share, abs=0.004)
    assert kind != "±10" or 0.4 < (before == 10).sum() / far.sum() < 0.6


def test_means_of_a_correlated_stream_are_hardly_correlated() -> None:
    def lag_one(window: int) -> float:
        r = []
        for seed in range(60):
            s = drift.autocorrelated(seed, window, 100)
            x = np.r_[s.reference, s.clean]
            assert len(s.changed) == drift.WITHIN
            r.append(np.corrcoef(x[1:], x[:-1])[0, 1])
        return float(np.mean(r))

    assert lag_one(1) == pytest.approx(0.5, abs=0.03)
    assert abs(lag_one(10)) < 0.15
    x = np.concatenate([drift.autocorrelated(seed, 1, 100).clean for seed in range(60)])
    assert x.std() == pytest.approx(1, abs=0.05)


def test_a_change_of_mean_and_spread() -> None:
    runs = [drift.changed(seed, 1.0, 2.0, 100) for seed in range(40)]
    after = np.concatenate([s.changed for s in runs])
    assert len(after) == 40 * drift.SLOW
    assert after.std() == pytest.approx(2, abs=0.1) and after.mean() == pytest.approx(1, abs=0.15)
    assert np.concatenate([s.clean for s in runs]).std() == pytest.approx(1, abs=0.05)


def test_every_detector_is_in_the_table_by_its_own_settings() -> None:
    plain = {key for key, settings in drift.SIDES.values() if not settings}
    assert plain == set(DETECTORS) and drift.SIDES[DEFAULT] == (DEFAULT, {})


def test_a_small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "QUICK_RUNS", 4)
    monkeypatch.setattr(drift, "CELLS", drift.CELLS[:2])
    found = drift.row(detector(DEFAULT), {}, quick=True)
    assert [c["kind"] for c in found["cells"]] == ["none", "±10"]
    assert found["found_within_30"] == min(c["found"] for c in found["cells"])
    assert found["passes"] and found["observations_per_second"] > 0
    assert found["clean_points"] == 2 * 4 * drift.QUICK_CLEAN
