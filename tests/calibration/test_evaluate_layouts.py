"""The evaluation of one network under several shapes of its output: the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.evaluate import evaluate
from tests.calibration.test_dense import NETS, fitted


@pytest.mark.parametrize(
    "alike",
    [
        ("N×C×H×W", "labels", "labels, axis kept", "N×C×(HW)"),
        ("one sigmoid", "one sigmoid, no axis"),
        ("values", "values N×1×H×W"),
    ],
)
def test_figures_do_not_depend_on_the_layout(alike: tuple[str, ...], tmp_path: Path) -> None:
    """The same network, its output in several shapes, with free sizes."""
    found = []
    for i, name in enumerate(alike):
        (tmp_path / str(i)).mkdir()
        bundle = fitted(tmp_path / str(i), NETS[name])
        found.append(evaluate(bundle, tmp_path / str(i) / "t.npz"))
    for other in found[1:]:
        assert other.n == found[0].n
        for a, b in zip(found[0].systems, other.systems, strict=True):
            for key, figure in a.metrics.items():
                assert b.metrics[key].value == pytest.approx(figure.value, abs=2e-4), key
        for x, y in zip(found[0].levels, other.levels, strict=True):
            assert y.coverage == pytest.approx(x.coverage, abs=2e-3)
        assert other.dense is not None
        # A map of one axis is no picture.
        assert bool(other.dense.pictures) == ("(HW)" not in alike[found.index(other)])
