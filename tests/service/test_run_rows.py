"""How many rows a run should have, from clocks that the test makes up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc.contract import Task
from service import models
from service.core import Core
from service.ledger import Ledger
from service.live import announce
from service.run_rows import MOST_BYTES, MOST_ROWS, best_rows, measure_rows
from service.settings import Settings
from tests.factory import tiny_bundle

HAND_OVER = 100e-6


class Clock:
    """Seconds of a run by its rows; notes what was run."""

    def __init__(self, seconds: Callable[[int], float]):
        self.seconds = seconds
        self.runs: list[int] = []

    def __call__(self, rows: int) -> float:
        self.runs.append(rows)
        return self.seconds(rows)

    def cost(self, rows: int) -> float:
        return (self.seconds(rows) + HAND_OVER) / rows


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        (lambda n: 6.4e-3 * n, 1),  # a row is as long as a row
        (lambda n: 6.4e-3 * n ** (1 + 1 / 16), 1),  # the more, the longer: the cache
        (lambda n: 50e-6 + 1.5e-6 * n, None),  # a small table: always cheaper
        (lambda n: 5e-3 * math.ceil(n / 8), 8),  # eight at once, on a wide device
        (lambda n: 300e-6 * n, 8),  # the handing over counts
    ],
    ids=["linear", "worse", "fixed", "wide", "handed over"],
)
def test_as_many_rows_as_make_one_cheaper(
    seconds: Callable[[int], float], found: int | None
) -> None:
    clock = Clock(seconds)
    assert best_rows(clock, MOST_ROWS) == found


@given(
    fixed=st.floats(0, 0.2),
    row=st.floats(1e-6, 0.2),
    growth=st.floats(0.5, 1.3),
    most=st.integers(1, 300),
)
def test_whatever_the_clock_the_time_is_bounded_and_no_tried_number_is_much_better(
    fixed: float, row: float, growth: float, most: int
) -> None:
    clock = Clock(lambda n: fixed + row * n**growth)
    got = best_rows(clock, most)
    tried = set(clock.runs)
    assert max(tried) <= most
    # What was begun is ended: a last size, run at most three times, each at most twice the former.
    assert sum(map(clock.seconds, clock.runs)) <= 1.0 + 3 * clock.seconds(max(tried))
    if got is not None:
        assert got in tried
        assert clock.cost(got) <= 1.05 * min(map(clock.cost, tried)) * (1 + 1e-9)


def test_one_slow_run_is_luck() -> None:
    """A machine that does something else meanwhile: the least of three counts."""
    hiccups = iter([5.0, 1.0, 1.0] * 20)
    assert best_rows(lambda n: (50e-6 + 1e-6 * n) * next(hiccups), MOST_ROWS) is None


def test_runs_are_copies_of_the_row_within_bytes() -> None:
    seen: list[int] = []

    def run(feed):
        assert (feed["x"] == [[1.0, 2.0]]).all() and feed["q_hat"].shape == (len(feed["x"]),)
        seen.append(len(feed["x"]))

    row = {"x": np.array([[1.0, 2.0]]), "q_hat": np.ones(1)}
    measure_rows(run, row, MOST_BYTES // 5)
    assert set(seen) <= {1, 2, 4} and 1 in seen
    measure_rows(run, row, MOST_BYTES * 2)
    assert seen[-1] == 1


def test_a_number_that_fails_ends_the_search_and_not_the_load() -> None:
    def run(feed):
        if len(feed["x"]) > 1:
            raise MemoryError("no room for two")

    assert measure_rows(run, {"x": np.ones((1, 2))}, 8) == 1
    with pytest.raises(KeyError):  # what not even one row can is no model
        measure_rows(lambda feed: feed["y"], {"x": np.ones((1, 2))}, 8)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_model_is_timed_on_its_first_golden_row_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, task: Task
) -> None:
    asked = {}

    def measured(run, row, size):
        asked.update(fields=run(row), row=row, size=size)
        return 3

    monkeypatch.setattr(models, "measure_rows", measured)
    model = models.load_model(tiny_bundle(tmp_path / "b", task), device="cpu", threads=1)
    assert model.run_rows == 3
    want = model.run(asked["row"], model.fields)
    assert asked["fields"].keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(asked["fields"][name], value)
    answer = sum(value.nbytes for value in want.values())
    assert asked["size"] == asked["row"]["x"].nbytes + answer
    ledger = Ledger.open(tmp_path / "l.sqlite")
    with caplog.at_level("INFO", "hedged.live"):
        announce(model, ledger)
    ledger.close()
    assert caplog.messages[-1].endswith("joining requests up to 3 row(s)")


def test_requests_share_runs_of_as_many_rows_as_their_model_has_found(tmp_path: Path) -> None:
    model = replace(
        models.load_model(tiny_bundle(tmp_path / "b"), device="cpu", threads=1), run_rows=2
    )
    ledger = Ledger.open(tmp_path / "l.sqlite")
    core = Core(Settings(bundles=tmp_path / "b"), {model.name: model}, ledger)
    sizes: list[int] = []

    async def ask() -> None:
        submit = core.batcher.submit

        def noted(run, feed, outputs, **more):
            def seen(feed, names):
                sizes.append(len(feed["x"]))
                return run(feed, names)

            return submit(shared.setdefault(run, seen), feed, outputs, **more)

        shared: dict = {}
        core.batcher.submit = noted  # type: ignore[method-assign]
        x = np.ones((5, 4), np.float32)
        single = [core.predict(model, {"x": x[:1]}) for _ in range(5)]
        await asyncio.gather(*single, core.predict(model, {"x": x}))
        await core.close()

    asyncio.run(ask())
    ledger.close()
    assert sorted(sizes) == [1, 2, 2, 5]
