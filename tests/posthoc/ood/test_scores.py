"""The scores against their definitions written out, and the identities that theory gives."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import oas

from posthoc.contract import Features, FitError
from posthoc.links import softmax
from posthoc.ood import gaussian, gen, mahalanobis, rmds

N, D, C = 500, 5, 3


def shrunk(x: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """Covariance shrunk as Chen et al. 2010, eq. 23, says it."""
    s = np.cov(x.T, bias=True) if centre else x.T @ x / len(x)
    n, p = x.shape
    trace, square = np.trace(s), np.trace(s @ s)
    rho = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    return (1 - min(1, rho)) * s + min(1, rho) * trace / p * np.eye(p)


def rows(seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, N)
    phi = rng.normal(size=(N, D)) + np.eye(C, D)[y] * 3
    return Features(phi, rng.normal(size=(N, C)) * 3, y)


def test_gen_is_its_definition() -> None:
    z = np.random.default_rng(0).normal(size=(20, 150)) * 3
    got = gen.score(gen.finish(150), None, z)
    for row, value in zip(softmax(z), got, strict=True):
        top = sorted(row, reverse=True)[:100]
        assert value == pytest.approx(sum(p**0.1 * (1 - p) ** 0.1 for p in top), rel=1e-9)


def test_gen_of_two_classes_ranks_like_the_largest_probability() -> None:
    z = np.random.default_rng(0).normal(size=(50, 2)) * 3
    order = np.argsort(gen.score(gen.finish(2), None, z))
    np.testing.assert_array_equal(order, np.argsort(-softmax(z).max(1)))


def test_gen_keeps_the_order_of_saturated_rows() -> None:
    z = np.asarray([[40.0, 0, 0], [60.0, 0, 0], [0.0, 0, 0]])
    sure, surer, unsure = gen.score(gen.finish(3), None, z)
    assert surer < sure < unsure


def test_rmds_is_its_definition() -> None:
    r = rows()
    state = rmds.finish(rmds.update(rmds.init(C, D), r))
    means = np.stack([r.phi[r.y == c].mean(0) for c in range(C)])
    centred = r.phi - means[r.y]
    within = np.linalg.inv(shrunk(centred, centre=False))
    common = np.linalg.inv(shrunk(r.phi))
    fresh = rows(1)
    want = [
        min((x - m) @ within @ (x - m) for m in means)
        - (x - r.phi.mean(0)) @ common @ (x - r.phi.mean(0))
        for x in fresh.phi
    ]
    np.testing.assert_allclose(rmds.score(state, fresh.phi, fresh.z), want, rtol=1e-6, atol=1e-6)


def test_rmds_leaves_out_classes_without_rows() -> None:
    r = rows()
    known = Features(r.phi, r.z, r.y)
    wider = rmds.finish(rmds.update(rmds.init(C + 4, D), known))
    assert wider.settings["classes_seen"] == C
    same = rmds.finish(rmds.update(rmds.init(C, D), known))
    np.testing.assert_array_equal(rmds.score(wider, r.phi, r.z), rmds.score(same, r.phi, r.z))


def test_rmds_needs_two_classes_and_labels_in_range() -> None:
    r = rows()
    with pytest.raises(FitError, match="at least two classes and has 1"):
        rmds.finish(rmds.update(rmds.init(C, D), Features(r.phi, r.z, np.zeros(N, int))))
    with pytest.raises(FitError, match=r"outside 0\.\.2"):
        rmds.update(rmds.init(C, D), Features(r.phi, r.z, np.full(N, C)))
    with pytest.raises(FitError, match="needs labels"):
        rmds.update(rmds.init(C, D), Features(r.phi, r.z))


def test_mahalanobis_is_its_definition() -> None:
    r = rows()
    state = mahalanobis.finish(mahalanobis.update(mahalanobis.init(C, D), r))
    inverse = np.linalg.inv(shrunk(r.phi))
    fresh = rows(2)
    want = [(x - r.phi.mean(0)) @ inverse @ (x - r.phi.mean(0)) for x in fresh.phi]
    np.testing.assert_allclose(mahalanobis.score(state, fresh.phi, fresh.z), want, rtol=1e-6)


def test_shrinkage_is_the_paper_and_near_scikit_learn() -> None:
    x = np.random.default_rng(0).normal(size=(30, 40))
    centred = x - x.mean(0)
    inverse, rho = gaussian.shrunk_inverse(centred.T @ centred, len(x))
    np.testing.assert_allclose(np.linalg.inv(inverse), shrunk(x), atol=1e-9)
    # scikit-learn leaves out the paper's two terms in 2/p.
    assert rho == pytest.approx(oas(x)[1], abs=2 / 40)
