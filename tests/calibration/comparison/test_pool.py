"""Work shared out to processes, and what they are sent."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from calibration.comparison import pool
from calibration.fit_options import FitOptions
from calibration.material import Columns, prepare
from posthoc.contract import FitError
from tests.factory import CLASSES, data, frozen_model


def squared(shared: int, x: int) -> tuple[int, int]:
    return shared * x**2, os.getpid()


def failing(shared: int, x: int) -> int:
    if x == shared:
        raise FitError(f"{x} is not to be had")
    return x


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_told_of(workers: int) -> None:
    told: list[tuple[int, int]] = []
    tasks = [(x,) for x in range(5)]

    def done(n: int, total: int) -> None:
        told.append((n, total))

    found = list(pool.each(squared, 10, tasks, workers=workers, done=done))
    assert sorted(v for v, _ in found) == [0, 10, 40, 90, 160]
    assert ({os.getpid()} == {p for _, p in found}) == (workers == 1)
    assert told == [(n, 5) for n in range(6)]


def test_an_error_of_a_process_is_the_callers() -> None:
    with pytest.raises(FitError, match="3 is not to be had"):
        list(pool.each(failing, 3, [(x,) for x in range(5)], workers=2))
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "1"


def test_cached_rows_are_mapped_and_not_sent(tmp_path: Path) -> None:
    material = prepare(
        frozen_model(tmp_path / "model.onnx", "classification"),
        data(tmp_path / "data.parquet", "classification", 5000, 0),
        options=FitOptions(task="classification"),
        columns=Columns(target="target", id="id", classes=CLASSES),
        cache_dir=tmp_path / "cache",
    )
    sent = pickle.dumps(material.cache)
    held = sum(a.nbytes for a in (material.cache.z, material.cache.phi))
    beside = pickle.dumps(
        [material.cache.y, material.cache.split_keys, material.cache.content_hashes]
    )
    assert len(sent) < len(beside) + held / 4 + 5000 * 40
    back = pickle.loads(sent)
    np.testing.assert_array_equal(back.phi, material.cache.phi)
    np.testing.assert_array_equal(back.z, material.cache.z)
    assert isinstance(back.phi, np.memmap)
