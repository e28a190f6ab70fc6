"""Shared work that nobody wants any more ends, and does not keep the machine busy."""

from __future__ import annotations

import multiprocessing
import signal

import pytest

from bench.processes import each


def work(i):
    if i == 0:
        return i
    if i == 1:
        raise ValueError("one")
    signal.pause()


def test_who_stops_asking_ends_the_others(capfd):
    found = each(work, [(0,), (2,), (3,), (4,)])
    assert next(found) == 0
    found.close()
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err.startswith("1/4\n")


def test_one_that_fails_ends_the_others():
    with pytest.raises(ValueError, match="one"):
        list(each(work, [(1,), (2,), (3,), (4,)]))
    assert not multiprocessing.active_children()


def test_all_are_answered():
    assert sorted(each(work, [(0,)] * 5)) == [0] * 5
