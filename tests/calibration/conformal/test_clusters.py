"""Classes that err alike share a cluster; what it covers is counted on rows never seen."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from calibration.conformal.cells import UNKNOWN, cells
from calibration.conformal.clusters import fit_clusters, k_means

ALPHA = 0.1


def draw(rng: np.random.Generator, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of n rows: those of even classes are twice as spread as those of odd ones."""
    y = rng.integers(0, classes, n)
    return rng.exponential(np.where(y % 2, 1.0, 3.0)), y


def test_classes_that_err_alike_share_a_cluster() -> None:
    s, y = draw(np.random.default_rng(0), 4000, 20)
    of = fit_clusters(np.append(s, [1.0, 1.0]), np.append(y, [20, 20]), 22, ALPHA)
    assert of[20] == of[21] == UNKNOWN  # two rows, and none
    even, odd = set(of[:20:2].tolist()), set(of[1:20:2].tolist())
    assert not even & odd and sorted(even | odd) == list(range(len(even | odd)))
    np.testing.assert_array_equal(of[:20], fit_clusters(s, y, 20, ALPHA))


def test_a_few_rows_make_one_cluster() -> None:
    s, y = draw(np.random.default_rng(1), 100, 4)
    assert fit_clusters(s, y, 4, ALPHA).tolist() == [0, 0, 0, 0]
    assert fit_clusters(s[:0], y[:0], 3, ALPHA).tolist() == [UNKNOWN] * 3


def test_a_class_needs_as_many_rows_as_its_level() -> None:
    for rows, known in ((8, False), (9, True), (10, True)):
        s = np.random.default_rng(2).normal(size=50 + rows)
        y = np.repeat([0, 1], [50, rows])
        assert (fit_clusters(s, y, 2, ALPHA)[1] != UNKNOWN) == known


def test_every_cluster_is_covered() -> None:
    """What is promised is the coverage of a cluster, whoever is in it; and the spread classes,
    which one threshold for all rows covers in three rows of four at best, come nearer to it."""
    covered: list[float] = []
    spread, alone = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        of = fit_clusters(*draw(rng, 1000, 20), 20, ALPHA)
        s, y = draw(rng, 1000, 20)
        made = cells("cluster", s, of[y], of, [str(i) for i in range(of.max() + 1)])
        q = made.thresholds(ALPHA)
        fresh, new = draw(rng, 2000, 20)
        inside = fresh <= q[new]
        covered += [float(inside[of[new] == k].mean()) for k in range(of.max() + 1)]
        spread.append(inside[new % 2 == 0].mean())
        alone.append((fresh <= made.every[900])[new % 2 == 0].mean())
    assert abs(np.mean(covered) - 0.9) < 0.004
    assert np.mean(alone) < 0.84 < 0.89 < np.mean(spread)


def test_k_means_finds_what_is_apart() -> None:
    rng = np.random.default_rng(0)
    middle = np.repeat(np.asarray([[0.0, 0], [5, 0], [0, 5]]), 30, axis=0)
    x = middle + rng.normal(size=middle.shape) * 0.3
    found = k_means(x, np.ones(90), 3)
    assert len({tuple(found[i : i + 30]) for i in (0, 30, 60)}) == 3
    assert all(len(set(found[i : i + 30].tolist())) == 1 for i in (0, 30, 60))
    assert len(set(k_means(np.zeros((5, 2)), np.ones(5), 3).tolist())) == 1


def test_the_share_of_a_class_is_exact_within_its_cell() -> None:
    """A cluster of one class is a label-conditional set: covered as k / (n + 1) says."""
    inside = 0
    for seed in range(400):
        s = np.random.default_rng(seed).normal(size=30)
        made = cells("class", s[:29], np.zeros(29, int), np.arange(1), ["0"])
        inside += s[29] <= made.thresholds(ALPHA)[0]
    assert binom.ppf(0.0005, 400, 27 / 30) <= inside <= binom.ppf(0.9995, 400, 27 / 30)
