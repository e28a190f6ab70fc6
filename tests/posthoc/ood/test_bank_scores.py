"""The sample of rows and the scores that read one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from posthoc.contract import Features, FitError
from posthoc.ood import knn, neighbours, sample
from posthoc.rows import take


def rows(n: int = 1000, seed: int = 0, d: int = 7) -> Features:
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, d)).astype(np.float32)
    return Features(phi, rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 3, n))


def sampled(size: int, *batches: Features) -> sample.Sample:
    found = sample.empty(size)
    for batch in batches:
        found = sample.add(found, batch)
    return found


def assert_same(a: sample.Sample, b: sample.Sample) -> None:
    for x, y in ((a.phi, b.phi), (a.z, b.z), (a.y, b.y)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("size", [1, 10, 250, 999, 1000, 5000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sample_does_not_know_blocks_order_or_merging(size: int, seed: int) -> None:
    r = rows(seed=seed)
    # The same features with other labels, and whole copies: ties of hashes.
    r = Features(np.concatenate([r.phi[:700], r.phi[:300]]), r.z, r.y)
    r = Features(r.phi, np.concatenate([r.z[:700], r.z[:100], r.z[800:]]), r.y)
    whole = sampled(size, r)
    rng = np.random.default_rng(seed)
    mixed = take(r, rng.permutation(len(r)))
    cuts = [0, *sorted(rng.choice(len(r), 9)), len(r)]
    pieces = [take(mixed, slice(i, j)) for i, j in pairwise(cuts)]
    assert_same(sampled(size, *pieces), whole)
    merged = sample.join(sampled(size, *pieces[::2]), sampled(size, *pieces[1::2]))
    assert_same(merged, whole)
    assert len(merged) == len(merged.z) == min(size, len(r)) and merged.seen == len(r)
    again = sample.add(sample.join(sampled(size, *pieces[:3]), sample.empty(size)), take(r, []))
    assert_same(sample.join(again, sampled(size, *pieces[3:])), whole)


def test_a_sample_is_the_rows_of_the_smallest_hashes_and_like_a_random_one() -> None:
    r = rows(20_000)
    kept = sampled(5_000, r)
    order = np.argsort(sample.hashes(r.phi))[:5_000]
    np.testing.assert_array_equal(kept.phi, r.phi[order])
    np.testing.assert_array_equal(kept.y, r.y[order])
    # A random quarter has means within four standard errors of those of all rows.
    assert np.abs(kept.phi.mean(0)).max() < 4 / np.sqrt(5_000)
    np.testing.assert_allclose(np.bincount(kept.y) / 5_000, np.bincount(r.y) / 20_000, atol=0.03)


def test_hashes_do_not_know_the_float_type_and_differ_for_numbers_of_few_digits() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(-8, 8) / 2] * 4), -1).reshape(-1, 4)
    found = sample.hashes(grid.astype(np.float16))
    np.testing.assert_array_equal(found, sample.hashes(grid.astype(np.float64)))
    assert len(np.unique(found)) == len(grid)
    np.testing.assert_array_equal(sample.hashes(-grid * 0), sample.hashes(grid * 0))
    # Each of the 64 bits is as often set as not.
    bits = (found[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(grid))


def test_rows_without_features_are_known_by_their_outputs() -> None:
    r = rows()
    blind = Features(None, r.z, None)
    found = sampled(100, blind)
    np.testing.assert_array_equal(found.z, r.z[np.argsort(sample.hashes(r.z))[:100]])
    with pytest.raises(FitError, match="black box"):
        _ = found.phi
    with pytest.raises(FitError, match="needs labels"):
        _ = found.y


def test_what_a_sample_cannot_hold_is_refused() -> None:
    r = rows(10)
    with pytest.raises(FitError, match="knn met features that are not finite"):
        sample.add(sample.empty(5), Features(r.phi * np.float64(1e300), r.z), "knn")
    with pytest.raises(FitError, match="outputs that are not finite"):
        sample.add(sample.empty(5), Features(r.phi, r.z * np.nan))
    with pytest.raises(FitError, match="no rows"):
        _ = sample.empty(5).phi
    with pytest.raises(FitError, match="of all rows or of none"):
        _ = sampled(50, r, Features(None, r.z, r.y)).z


def slow_knn(bank: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    """Distances to the k-th neighbour at length one, row by row."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    at = [q / (np.linalg.norm(q) or 1.0) for q in x]
    return np.asarray([sorted(np.linalg.norm(bank - q, axis=1))[k - 1] for q in at])


@pytest.mark.parametrize(("n", "k"), [(2, 1), (60, 3), (999, 49), (1000, 50), (4000, 50)])
def test_knn_is_the_distance_to_the_kth_neighbour(n: int, k: int) -> None:
    r = rows(n, d=5)
    state = knn.finish(knn.update(knn.init(3, 5), r))
    assert state.settings == {"k": k, "bank": n, "rows": n}
    x = rows(40, seed=1, d=5).phi
    x[7] = 0.0
    got = knn.score(state, x, np.zeros((40, 3)))
    assert got[7] == 0.0
    keep = np.arange(40) != 7
    want = slow_knn(r.phi.astype(np.float64), x[keep].astype(np.float64), k)
    np.testing.assert_allclose(np.sqrt(2 + 2 * got[keep]), want, rtol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_ranks_as_scikit_learn_in_either_metric(metric: str) -> None:
    r, x = rows(3000, d=20), rows(200, seed=1, d=20).phi
    state = knn.finish(knn.update(knn.init(3, 20), r))
    bank, at = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (r.phi, x))
    search = NearestNeighbors(n_neighbors=50, metric=metric, algorithm="brute").fit(bank)
    want = search.kneighbors(at)[0][:, -1]
    got = knn.score(state, x, np.zeros((200, 3)))
    np.testing.assert_allclose(1 + got if metric == "cosine" else np.sqrt(2 + 2 * got), want, 1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("m", "k"), [(700, 5), (703, 5), (5000, 50), (40, 40)])
def test_neighbours_that_float32_cannot_tell_apart_are_told_in_float64(
    m: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    near = neighbours.unit(1.0 + 1e-4 * rng.normal(size=(m, 30))).astype(np.float32)
    x = neighbours.unit(1.0 + 1e-4 * rng.normal(size=(50, 30)))
    want = np.sort(x @ near.astype(np.float64).T, axis=1)[:, -k]
    np.testing.assert_allclose(neighbours.kth_cosine(x, near, k), want, rtol=0, atol=1e-15)
    copies = np.repeat(near[:1], m, 0)  # all are candidates
    want = x @ near[0].astype(np.float64)
    np.testing.assert_allclose(neighbours.kth_cosine(x, copies, k), want, rtol=0, atol=1e-15)


def test_knn_keeps_a_bounded_bank_and_refuses_what_has_no_angle() -> None:
    r = rows(knn.BANK + 500, d=3)
    state = knn.finish(knn.update(knn.init(3, 3), r))
    assert state.tensors["bank"].shape == (knn.BANK, 3) and state.settings["rows"] == len(r)
    with pytest.raises(FitError, match="knn needs at least two rows and has 1"):
        knn.finish(knn.update(knn.init(3, 3), take(r, slice(1))))
    with pytest.raises(FitError, match="knn: every feature is constant"):
        knn.finish(knn.update(knn.init(3, 3), Features(np.ones((9, 3)), r.z[:9])))


def test_knn_tells_rows_of_another_direction_and_not_of_another_length() -> None:
    rng = np.random.default_rng(0)
    phi = np.abs(rng.normal(size=(500, 8))) + np.eye(3, 8)[rng.integers(0, 3, 500)] * 5
    state = knn.finish(knn.update(knn.init(3, 8), Features(phi, np.zeros((500, 3)))))
    z = np.zeros((100, 3))
    inside = knn.score(state, phi[:100], z)
    np.testing.assert_allclose(knn.score(state, phi[:100] * 7, z), inside, atol=1e-12)
    assert knn.score(state, -phi[:100], z).min() > inside.max()
