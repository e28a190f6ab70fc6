"""The figures of strange rows: cells of the flags, and a real split of a small set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import betabinom

from bench import ood
from calibration.ood_choice import MIXTURES


def test_a_cell_is_held_against_its_law() -> None:
    flagged = np.arange(400) < 30
    cell = ood._cell("p_value", 0.05, 500, 400, 476, flagged)
    most = next(m for m in range(401) if betabinom.cdf(m, 400, 25, 476) >= 0.99)
    assert cell["rate"] == 30 / 400 and cell["most"] == pytest.approx(most / 400)
    assert cell["inside"] == (most >= 30)
    assert not ood._cell("p_value", 0.05, 500, 400, 476, np.ones(400, bool))["inside"]


@pytest.mark.long
def test_a_real_split_of_a_small_set() -> None:
    found = ood.measure("letter", 0)
    by = found["auroc"]
    assert found["chosen"] in MIXTURES and by["auto"] == by[found["chosen"]]
    assert found["best"] >= max(by["auto"], by["auto_corrupt"]) >= by["auto"] > by[ood.MSP]
    assert found["below"] is False
    ways = {(c["how"], c["level"]) for c in found["flags"]}
    assert ways == {("p_value", 0.05), ("p_value", 0.1), ("neyman_pearson", 0.05)}
    plain = ood.measure("satimage", 0)
    assert "auroc" not in plain and len(plain["flags"]) == 3
