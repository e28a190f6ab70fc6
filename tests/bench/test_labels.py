"""The benchmark of labels on a real server, with few of them."""

from __future__ import annotations

from pathlib import Path

from bench.http_sides import Question
from bench.labels import rates
from tests.factory import tiny_bundle


def test_labels_find_their_predictions_both_ways(tmp_path: Path) -> None:
    found = rates(Question.of(tiny_bundle(tmp_path / "b")), tmp_path, 500)
    assert found.pop("labels") == 500
    assert all(rate > 0 for rate in found.values()) and len(found) == 4
