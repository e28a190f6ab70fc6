"""Times of two sides: counted, taken in turn, and compared."""

from __future__ import annotations

import pytest

from bench.timing import Times, compared, in_turn, per_call, ratio


def test_a_call_is_repeated_until_the_time_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    assert per_call(lambda: work(0.25), least=1.0) == 0.25
    assert now[0] == 101.0
    assert per_call(lambda: work(5.0), least=1.0) == 5.0
    assert now[0] == 106.0


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    first, second = in_turn((lambda: side("peer"), lambda: side("ours")), 3)
    assert order == ["peer", "ours"] * 3
    assert (first.seconds, second.seconds) == ((1.0, 3.0, 5.0), (2.0, 4.0, 6.0))


def test_a_ratio_above_one_means_that_ours_is_faster() -> None:
    peer, ours = Times((8.0, 6.0, 100.0)), Times((2.0, 3.0, 4.0))
    assert ratio(peer, ours) == 8.0 / 3.0
    found = compared(peer, ours)
    assert (found["ratio_low"], found["ratio_high"]) == (2.0, 25.0)
    assert found["peer"] == {"median_s": 8.0, "low_s": 6.0, "high_s": 100.0, "rounds": 3}
