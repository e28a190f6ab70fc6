"""The bench of monitors on few streams: what it counts is what its monitors say."""

from __future__ import annotations

import numpy as np
import pytest

from bench import monitors
from calibration.drift import martingale, risk_monitor


def test_rates_are_shares_of_streams_that_alarm() -> None:
    row = monitors.martingale_null("normal", 20, 40)
    again = 0
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=20 + monitors.LENGTH)
        again += martingale.run(martingale.start(x[:20], seed=seed), x[20:])[0].alarm(0.05)
    assert row["martingale"]["0.05"] == again / 40
    # Twenty reference scores and a thousand of the stream: the fixed reference shows.
    assert row["fixed_reference"]["0.05"] > 0.4 > row["martingale"]["0.05"]
    assert row["limits"]["0.01"] == pytest.approx(0.01 + 3 * np.sqrt(0.01 * 0.99 / 40))
    assert "fixed_reference" not in monitors.martingale_null("five values", 20, 2)


def test_delays_count_up_to_the_alarm_and_groups_wait_for_their_end() -> None:
    one, ten = (monitors.risk_delay(0.5, group, 20) for group in (1, 10))
    assert one["found"] == ten["found"] == 1
    assert one["median"] <= ten["median"] <= one["median"] + 20 and ten["median"] % 10 == 0
    covered = np.random.default_rng(0).random(200) < 0.5
    state, _ = risk_monitor.run(risk_monitor.watch_level(0.1, 1000), covered[: one["q90"]])
    assert state.alarm
    kept = monitors.martingale_delay("mean + 2 sd", 100, 5)
    assert 5 < kept["median"] < 60
    assert monitors._delays([3, None, None], 10) == {
        "median": None,
        "q90": None,
        "found": pytest.approx(1 / 3),
        "horizon": 10,
    }


def test_a_binomial_test_at_every_label_alarms_too_often() -> None:
    row = monitors.risk_null("edge", 100)
    assert row["binomial_after_every_label"]["0.05"] > 0.15
    assert row["risk_monitor"]["0.05"] <= row["limits"]["0.05"]
