"""The benchmark of coverage: what it calls inside is what chance allows, and its rows are drawn as
they say. Made-up rows, small; other libraries are not installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import betabinom, kstest, norm

from bench import coverage
from bench.conformal_peer import Side
from bench.coverage_cells import ALPHAS, MARGINAL, UNKNOWN_GROUP, Cell, class_cells, value_cells
from bench.coverage_null import allowed, inside, position
from bench.coverage_peers import ours
from bench.coverage_rows import Rows, Split
from bench.coverage_shift import SHIFTS, shifted
from bench.coverage_tables import figures
from calibration.bundle import conformal_rank


def rows(n: int, task: str, rng: np.random.Generator) -> Rows:
    """Of a calibrated model: classes drawn from its probabilities, or targets about its means."""
    phi = rng.normal(size=(n, 4))
    group = rng.integers(0, 3, n)
    none = np.zeros((n, 0))
    if task == "classification":
        z = phi @ np.arange(12.0).reshape(4, 3) / 6
        p = softmax(z, axis=1)
        y = (p.cumsum(1) < rng.uniform(size=(n, 1))).sum(1)
        return Rows(phi, z, y, group, p, none, none)
    mean, std = phi[:, :1] * 2, np.exp(phi[:, 1:2] / 2)
    return Rows(phi, mean, rng.normal(mean, std), group, none, mean, std)


def made(task: Any, seed: int, n: int = 600) -> Split:
    rng = np.random.default_rng(seed)
    return Split(task, *(rows(n, task, rng) for _ in range(4)), np.ones(1))


def cell(covered: int, n: int = 99, m: int = 200, *, lower: bool = False) -> Cell:
    return Cell("lac", 0.1, "", n, m, covered, lower)


def test_a_cell_is_inside_its_beta_binomial_band() -> None:
    law = betabinom(200, 90, 10)
    low, high = law.ppf(0.005), law.ppf(0.995)
    assert [inside(cell(int(c))) for c in (low - 1, low, high, high + 1)] == [
        False,
        True,
        True,
        False,
    ]
    assert inside(cell(200, lower=True))
    assert inside(cell(200, n=8))  # everything is in the set, and all rows are covered
    mid = law.cdf(170) - law.pmf(170) / 2
    assert position(cell(170)) == pytest.approx(norm.ppf(mid), abs=1e-9)
    for covered, sign in ((0, -1), (9_950, 1)):  # far away, and still on its own side
        assert sign * position(cell(covered, n=4999, m=10_000)) > 5


def test_positions_of_valid_sets_are_normal_and_few_are_outside() -> None:
    found = [
        ("made", seed, c)
        for seed in range(20)
        for c in class_cells(made("classification", seed), seed)
    ]
    for method in ("lac", "aps, randomised", "topk, randomised", "lac by class", "lac by group"):
        mine = [f for f in found if f[2].method == method]
        assert sum(not inside(c) for _, _, c in mine) <= allowed(mine)
        places = [position(c) for _, _, c in mine if c.alpha == 0.1]
        assert kstest(places, "norm").pvalue > 1e-3, method
    lower = {c.method for _, _, c in found if c.lower}
    assert {"topk", "lac, never empty"} <= lower
    assert not {"lac", "aps, randomised"} & lower


def test_a_rank_too_low_is_found() -> None:
    """One that forgets the n + 1: on 60 splits it is outside more often than chance allows."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(60):
        u, v = rng.uniform(size=20), rng.uniform(size=4000)
        for alpha in ALPHAS:
            held = int((v <= np.quantile(u, 1 - 2 * alpha)).sum())
            found.append(("made", seed, Cell("wrong", alpha, "", 20, 4000, held, False)))
    assert sum(not inside(c) for _, _, c in found) > allowed(found)


def test_intervals_of_every_side_and_groups() -> None:
    found = list(value_cells(made("regression", 0), 0))
    by = {(c.method, c.alpha): c for c in found if not c.part}
    assert len(by) == 3 * (4 * 3 + 1)
    for method in ("residual", "absolute", "cqr", "cdf"):
        for side in ("", ", lower", ", upper"):
            c = by[f"{method}{side}", 0.1]
            assert (c.n, c.m) == (600, 600)
            assert abs(position(c)) < 4
            assert (c.size is None) == bool(side)
    for alpha in ALPHAS:
        assert by[f"residual{UNKNOWN_GROUP}", alpha].covered == by["residual", alpha].covered
    grouped = [c for c in found if c.method == "residual by group" and c.alpha == 0.1]
    assert [c.part for c in grouped] == ["0", "1", "2"]
    assert sum(c.m for c in grouped) == sum(c.n for c in grouped) == 600
    assert any(c.method == f"residual{MARGINAL}" and c.n == 600 for c in found)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_true_weights_cover_under_every_shift(task: str) -> None:
    found = [("made", s) for seed in range(4) for s in shifted(made(task, seed), seed)]
    assert {s.shift for _, s in found} == set(SHIFTS)
    told = figures(found, [])["shift"]
    assert told["cells"] == len(told["table"]) == 9
    for row in told["table"]:
        oracle = row["oracle"]
        assert oracle["coverage"] > 1 - row["alpha"] - 4 * oracle["error"]
        assert row["oracle"]["refused"] == 0
        assert 300 < oracle["effective"] < 600
        assert ("bbse" in row) == (task == "classification" and row["shift"] == "target")


def test_refusals_are_counted() -> None:
    found = [("made", s) for s in shifted(made("regression", 0, n=40), 0)]
    said = {s.refused for _, s in found if s.form == "oracle"}
    assert all(v.startswith("under this shift 40 conformal rows are worth") for v in said)
    told = figures(found, [])["shift"]["table"]
    assert all(r["oracle"]["coverage"] is None and r["oracle"]["refused"] == 1 for r in told)
    assert all(r["unweighted"]["coverage"] is not None for r in told)


def test_the_parts_add_up() -> None:
    found = [
        ("made", seed, c) for seed in range(3) for c in value_cells(made("regression", seed), seed)
    ]
    told = coverage.judge(found, 3)
    assert told["cells"] == 3 * 3 * 12
    assert told["small_cells"] == 3 * 3 * 3
    assert told["levels"] == 3 * 12
    assert told["unknown_group_differs"] == 0
    assert sum(m["cells"] for m in told["methods"]) == told["cells"]
    assert sum(sum(m["positions"]) for m in told["methods"]) == told["cells"]
    assert len(told["groups"]) == 3 * 3 * 2


def test_a_side_counts_what_its_sets_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(90, 4)).astype(np.float32), rng.integers(0, 4, 90)
    path, out = tmp_path / "pool.npz", tmp_path / "found.npz"
    np.savez(path, z=z, y=y, rows=np.stack([rng.permutation(90) for _ in range(400)]))

    def run(sets: Any, score: str) -> Any:
        side = Side(sets)
        side.load(str(path))
        side.run(str(out), score, 20, 50, list(ALPHAS))
        with np.load(out) as data:
            return data["value"].mean(0)

    def first(score: str, a: Any, b: Any, new: Any, alphas: Sequence[float]) -> list[Any]:
        return [np.arange(4) < 2 + np.zeros((len(new), 1)) for _ in alphas]

    np.testing.assert_allclose(run(first, "lac"), [[(y < 2).mean(), 2]] * 3, atol=0.02)
    for score in ("lac", "aps", "raps"):
        want = [conformal_rank(20, a) / 21 for a in ALPHAS]
        np.testing.assert_allclose(run(ours(0), score)[:, 0], want, atol=0.016)
