"""The spool keeps every entry through crashes, in order, and gives each to one process only."""

from __future__ import annotations

import errno
import os

import pytest

from service import spool as module
from service.spool import Spool, SpoolFullError


class AwayError(Exception):
    pass


def entries(spool: Spool) -> list[int]:
    found: list[int] = []
    spool.replay(lambda some: found.extend(entry["n"] for entry in some))
    return found


def test_entries_come_back_in_order_and_once(tmp_path):
    spool = Spool(tmp_path / "spool", "k")
    assert not spool.pending
    for n in range(5):
        spool.append({"n": n, "text": "ü\n"})
    assert spool.pending
    assert entries(spool) == list(range(5))
    assert not spool.pending
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_failed_replay_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER", 2)
    spool = Spool(tmp_path, "k")
    for n in range(6):
        spool.append({"n": n})
    seen: list[list[int]] = []

    def apply(entries):
        found = [entry["n"] for entry in entries]
        if found[0] == 2 and len(seen) == 1:
            raise AwayError
        seen.append(found)
        if found[0] == 0:
            spool.append({"n": 6})  # arrives while the replay runs

    with pytest.raises(AwayError):
        spool.replay(apply)
    assert spool.pending
    seen.append([-1])
    spool.replay(apply)
    assert seen == [[0, 1], [-1], [2, 3], [4, 5], [6]]


def test_a_replay_ends_in_time_and_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER_BYTES", 8)
    spool = Spool(tmp_path, "k")
    for n in range(5):
        spool.append({"n": n})
    seen: list[int] = []
    for _ in range(4):
        spool.replay(lambda some: seen.extend(entry["n"] for entry in some), 0)
        assert spool.pending
    spool.append({"n": 5})
    spool.replay(lambda some: seen.extend(entry["n"] for entry in some))
    assert seen == [0, 1, 2, 3, 4, 5]
    assert not spool.pending


def test_a_torn_last_line_is_left_out(tmp_path):
    spool = Spool(tmp_path, "k")
    spool.append({"n": 0})
    spool.append({"n": 1})
    spool.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b'{"n": 2, "ro')
    after = Spool(tmp_path, "k")
    after.adopt()
    assert entries(after) == [0, 1]


def test_a_live_segment_belongs_to_its_process_and_a_dead_one_to_the_next(tmp_path):
    one, two, other = Spool(tmp_path, "k"), Spool(tmp_path, "k"), Spool(tmp_path, "other")
    one.append({"n": 1})
    two.adopt()
    assert not two.pending
    one.close()
    other.adopt()
    assert not other.pending
    two.adopt()
    two.append({"n": 2})
    assert entries(two) == [1, 2]


def test_the_bound_holds_and_frees_itself(tmp_path):
    spool = Spool(tmp_path, "k", max_bytes=30)
    spool.append({"n": 0})
    spool.append({"n": 1})
    spool.append({"n": 2})
    with pytest.raises(SpoolFullError, match="bytes"):
        spool.append({"n": 3})
    assert entries(spool) == [0, 1, 2]
    spool.append({"n": 3})
    assert entries(spool) == [3]


def test_half_a_line_on_a_full_disk_does_not_spoil_the_next(tmp_path, monkeypatch):
    spool = Spool(tmp_path, "k")
    spool.append({"n": 0})
    write = os.write

    def full(fd, data):
        if len(data) > 4:
            return write(fd, bytes(data)[:4])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(OSError, match="no space"):
        spool.append({"n": 1})
    monkeypatch.undo()
    spool.append({"n": 2})
    assert entries(spool) == [0, 2]
