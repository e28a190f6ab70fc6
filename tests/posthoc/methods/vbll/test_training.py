"""Mini-batches, Adam, coordinates and the weight of the data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from posthoc.contract import Features
from posthoc.methods.vbll import training
from posthoc.methods.vbll.coordinates import affine_of, measure, standard, with_one
from posthoc.methods.vbll.training import Adam, batches, emphasis, epochs_for, learned_prior, steps
from posthoc.rows import Rows, of, take


def numbered(n: int) -> Features:
    at = np.arange(n, dtype=np.float64)
    return Features(at[:, None] * [1.0, -2.0], at[:, None], at.astype(np.int64))


def in_pieces(rows: Features, sizes: list[int]) -> Rows:
    edges = np.cumsum([0, *sizes])
    pieces = [take(rows, slice(a, b)) for a, b in pairwise(edges)]
    return Rows(lambda: iter(pieces), len(rows))


def test_an_epoch_is_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WINDOW", 32)
    rows = numbered(101)
    made = list(batches(of(rows, 7), np.random.default_rng(0), 10))
    assert len(made) == steps(101, 10) == 3 * 4 + 1
    assert max(len(b) for b in made) <= 10 and min(len(b) for b in made) >= 5
    found = np.concatenate([b.y for b in made])
    assert sorted(found) == list(range(101)) and list(found) != list(range(101))
    for b in made:
        np.testing.assert_array_equal(b.phi[:, 1], -2.0 * b.y)


def test_batches_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WINDOW", 16)
    rows = numbered(45)
    for sizes in ([45], [1, 30, 0, 14], [15, 15, 15]):
        made = batches(in_pieces(rows, sizes), np.random.default_rng(1), 5)
        got = [b.y.tolist() for b in made]
        if sizes == [45]:
            want = got
        assert got == want


def test_enough_epochs() -> None:
    assert epochs_for(1_000_000, 128) == 10
    n = 2500
    assert 600 <= epochs_for(n, 128) * steps(n, 128) < 600 + steps(n, 128)


def test_emphasis_never_falls_below_one() -> None:
    assert emphasis("elbo", 10**6, 100) == 1.0
    assert emphasis("de_elbo", 500, 100) == 5.0
    assert emphasis("de_elbo", 50, 100) == 1.0


def test_adam_finds_the_top_of_a_quadratic() -> None:
    target, at = np.asarray([[1.0, -3.0], [0.2, 100.0]]), np.zeros((2, 2))
    scale = np.asarray([[1.0, 1e-4], [1e3, 1e-2]])
    adam = Adam(at, 0.5, 2000)
    for _ in range(2000):
        adam.step(scale * (target - at))
    np.testing.assert_allclose(at, target, rtol=1e-3)


def test_the_prior_moves_to_its_fixed_point() -> None:
    # Without any curvature S = tau², and m = 0: the prior falls to the floor of its range.
    low = training.PRIOR_SCALES[0]
    prior = 1.0
    for _ in range(50):
        prior = learned_prior(prior, np.zeros((2, 3)), 6 * prior * 0.5, 1.0)
    assert prior == low
    # At the fixed point tau² = (|m|² + tr S) / D.
    mean, curvature, prior = np.asarray([[1.0, 2.0]]), np.asarray([3.0, 0.1]), 1.0
    for _ in range(500):
        prior = learned_prior(prior, mean, float((1 / (curvature + 1 / prior)).sum()), 1.0)
    trace = float((1 / (curvature + 1 / prior)).sum())
    assert prior == pytest.approx((5.0 + trace) / 2, rel=1e-6)


@pytest.mark.parametrize("sizes", [[200], [1, 99, 0, 100]])
def test_coordinates_are_standard(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(200, 4)) * [1e-3, 1.0, 50.0, 1.0] + [0.0, 3.0, 1e4, 0.0]
    phi[:, 3] = 7.0  # a constant
    affine = measure(in_pieces(Features(phi, phi), sizes))
    x = affine(phi)
    np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(x[:, :3].std(0), 1.0, rtol=1e-6)
    assert (x[:, 3] == 0.0).all()
    for part in (affine.centre, affine.inverse):
        np.testing.assert_array_equal(part, part.astype(np.float32))
    back = affine_of(affine.tensors())
    np.testing.assert_array_equal(back(phi), x)
    np.testing.assert_array_equal(with_one(x)[:, -1], 1.0)


def test_nothing_but_constants() -> None:
    affine = standard(np.asarray([2.0, 0.0]), np.zeros(2))
    np.testing.assert_array_equal(affine(np.asarray([[2.0, 1.0]])), [[0.0, 1.0]])
