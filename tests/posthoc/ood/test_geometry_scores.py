"""Scores of feature geometry against their definitions written out, and their identities."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance

from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.graph import Fragment, standalone
from posthoc.ood import fdbd, mahalanobis, mds, mds_l2, nci, rmds, rmds_l2, vim
from posthoc.runtime import open_session

N, D, C = 600, 9, 4
OF_CLASSES = [mds, mds_l2, rmds, rmds_l2]
OF_HEADS = [vim, fdbd, nci]
every = pytest.mark.parametrize("page", [*OF_CLASSES, *OF_HEADS], ids=lambda p: p.INFO.name)


def head(seed: int = 0, classes: int = C) -> LinearHead:
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(classes, D)), rng.normal(size=classes))


def outputs(phi: np.ndarray, known: LinearHead) -> np.ndarray:
    return phi @ known.weight.T + known.bias


def rows(seed: int = 0, n: int = N) -> Features:
    """Classes apart, features of unequal spread, some of them nearly a sum of others."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    phi = rng.normal(size=(n, D)) * np.linspace(0.5, 2, D) + np.eye(C, D)[y] * 4 + 1
    phi[:, -1] = phi[:, 0] + 0.1 * phi[:, -1]
    return Features(phi, outputs(phi, head()), y)


def fitted(page: ModuleType, r: Features, known: LinearHead | None = None) -> State:
    state = page.finish(page.update(page.init(C, r.phi.shape[1]), r), known or head())
    assert isinstance(state, State)
    return state


def scores(page: ModuleType, fit: Features, of: Features) -> np.ndarray:
    return np.asarray(page.score(fitted(page, fit), of.phi, of.z))


def in_graph(page: ModuleType, state: State, r: Features) -> np.ndarray:
    g = Fragment(17)
    phi, z = g.input("phi", "float32", ["N", D]), g.input("z", "float32", ["N", C])
    g.op("Identity", page.emit(g, state, phi, z), out="score")
    used = {name for node in g.nodes for name in node.input}
    g.inputs[:] = [i for i in g.inputs if i.name in used]
    session = open_session(standalone(g, {"score": ("float32", (-1,))}))
    feed = {"phi": np.asarray(r.phi, np.float32), "z": np.asarray(r.z, np.float32)}
    return np.asarray(session.run(["score"], {k: v for k, v in feed.items() if k in used})[0])


def unit(phi: np.ndarray) -> np.ndarray:
    return np.stack([x / np.linalg.norm(x) for x in phi])


def shrunk(x: np.ndarray) -> np.ndarray:
    """Covariance of centred rows, shrunk as Chen et al. 2010, eq. 23, says it."""
    s, (n, p) = x.T @ x / len(x), x.shape
    trace, square = np.trace(s), np.trace(s @ s)
    rho = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    return (1 - min(1, rho)) * s + min(1, rho) * trace / p * np.eye(p)


@pytest.mark.parametrize("page", OF_CLASSES, ids=lambda p: p.INFO.name)
def test_distances_to_class_means_are_their_definition(page: ModuleType) -> None:
    r, fresh = rows(), rows(1, 80)
    normed = page in (mds_l2, rmds_l2)
    phi, new = (unit(x.phi) if normed else x.phi for x in (r, fresh))
    means = [phi[r.y == c].mean(0) for c in range(C)]
    within = np.linalg.inv(shrunk(np.stack([x - means[c] for x, c in zip(phi, r.y, strict=True)])))
    common = np.linalg.inv(shrunk(phi - phi.mean(0)))
    want = []
    for x in new:
        near = min((x - m) @ within @ (x - m) for m in means)
        far = (x - phi.mean(0)) @ common @ (x - phi.mean(0))
        want.append(near - far if page in (rmds, rmds_l2) else near)
    np.testing.assert_allclose(scores(page, r, fresh), want, rtol=1e-6, atol=1e-6)


def test_relative_is_nearest_less_common_distance() -> None:
    r, fresh = rows(), rows(1)
    nearest, relative, common = (scores(p, r, fresh) for p in (mds, rmds, mahalanobis))
    np.testing.assert_allclose(nearest - relative, common, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page", [mds_l2, rmds_l2], ids=lambda p: p.INFO.name)
def test_lengths_of_rows_are_of_no_account(page: ModuleType) -> None:
    r, fresh = rows(), rows(1)
    factor = np.random.default_rng(2).uniform(0.1, 10, (N, 1))
    longer, new = (replace(x, phi=x.phi * factor) for x in (r, fresh))
    got = scores(page, longer, new)
    np.testing.assert_allclose(got, scores(page, r, fresh), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("page", [mds_l2, rmds_l2], ids=lambda p: p.INFO.name)
def test_a_row_of_zeros_has_a_score(page: ModuleType) -> None:
    state, nothing = fitted(page, rows()), Features(np.zeros((1, D)), np.zeros((1, C)))
    want = page.score(state, nothing.phi, nothing.z)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(in_graph(page, state, nothing), want, rtol=1e-5)


def test_nearest_of_one_class_is_the_distance_to_its_mean() -> None:
    r = replace(rows(), y=np.zeros(N, np.int64))
    np.testing.assert_allclose(scores(mds, r, r), scores(mahalanobis, r, r), rtol=1e-9)


@pytest.mark.parametrize("page", [mds, rmds], ids=lambda p: p.INFO.name)
def test_distances_keep_their_digits_where_classes_lie_far_apart(page: ModuleType) -> None:
    """Multiplied out, these numbers of some 5 would be differences of 10^7."""
    r = rows()
    phi = r.phi + 2000 * np.eye(C, D)[r.y]
    far = Features(phi.astype(np.float32), r.z, r.y)
    state = fitted(page, far)
    want = page.score(state, far.phi, far.z)
    assert np.abs(np.median(want)) < 20
    np.testing.assert_allclose(in_graph(page, state, far), want, rtol=1e-4, atol=1e-3)


def test_vim_is_its_definition() -> None:
    r, fresh, known = rows(), rows(1, 80), head()
    u = -np.linalg.pinv(known.weight) @ known.bias
    covariance = EmpiricalCovariance(assume_centered=True).fit(r.phi - u).covariance_
    values, vectors = np.linalg.eigh(covariance)
    beyond = vectors[:, np.argsort(-values)[D // 2 :]]

    def residual(phi: np.ndarray) -> np.ndarray:
        return np.asarray([np.linalg.norm((x - u) @ beyond) for x in phi])

    alpha = r.z.max(1).mean() / np.sqrt((residual(r.phi) ** 2).mean())
    energy = [np.log(sum(np.exp(v) for v in z)) for z in fresh.z]
    want = alpha * residual(fresh.phi) - energy
    np.testing.assert_allclose(scores(vim, r, fresh), want, rtol=1e-8, atol=1e-8)
    paper = r.z.max(1).mean() / residual(r.phi).mean()
    assert 0.85 < alpha / paper <= 1  # the root mean square for the mean


def test_vim_of_an_empty_residual_is_the_energy() -> None:
    flat = np.zeros((D, D))
    flat[: D // 2, : D // 2] = np.eye(D // 2)
    known = LinearHead(head().weight, np.zeros(C))
    r = rows()
    r = Features(r.phi @ flat, outputs(r.phi @ flat, known), r.y)
    state = fitted(vim, r, known)
    energy = np.log(np.exp(r.z).sum(1))
    np.testing.assert_allclose(vim.score(state, r.phi, r.z), -energy, atol=1e-9)
    # What lies off the features' plane still counts, and not without bound.
    off = vim.score(state, r.phi + np.eye(D)[-1], r.z)
    assert (off > -energy + 0.1).all() and (off < 1e3).all()


def test_vim_turns_with_the_features() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    r, fresh, known = rows(), rows(1), head()
    turned = LinearHead(known.weight @ turn, known.bias)
    state = fitted(vim, replace(r, phi=r.phi @ turn), turned)
    got = vim.score(state, fresh.phi @ turn, fresh.z)
    np.testing.assert_allclose(got, scores(vim, r, fresh), rtol=1e-6)


def test_vim_rises_with_the_residual_only() -> None:
    r = rows()
    state = fitted(vim, r)
    _, _, all_of = np.linalg.svd(state.tensors["basis"].T)
    principal, rest = all_of[0 : D - D // 2], all_of[D - D // 2 :]
    here = vim.score(state, r.phi, r.z)
    np.testing.assert_allclose(vim.score(state, r.phi + 5 * rest[0], r.z), here, atol=1e-6)
    assert (vim.score(state, r.phi + 50 * principal[0], r.z) > here).all()


def test_principal_directions_follow_the_width() -> None:
    widths = (2048, 4096, 2047, 768, 767, 10, 1)
    assert [vim.principal(d) for d in widths] == [1000, 1000, 512, 512, 383, 5, 0]


def test_fdbd_is_its_definition() -> None:
    r, fresh, w = rows(), rows(1, 80), head().weight
    want = []
    for x, z in zip(fresh.phi, fresh.z, strict=True):
        top = int(z.argmax())
        away = [abs(z[top] - z[k]) / np.linalg.norm(w[top] - w[k]) for k in range(C) if k != top]
        want.append(-np.mean(away) / np.linalg.norm(x - r.phi.mean(0)))
    np.testing.assert_allclose(scores(fdbd, r, fresh), want, rtol=1e-6)


def test_fdbd_measures_the_way_to_the_boundary() -> None:
    known = LinearHead(head().weight[:2], head().bias[:2])
    r = rows()
    r = Features(r.phi, outputs(r.phi, known))
    state = fitted(fdbd, r, known)
    away = -fdbd.score(state, r.phi, r.z) * np.linalg.norm(r.phi - r.phi.mean(0), axis=1)
    step = known.weight[1] - known.weight[0]
    step = step / np.linalg.norm(step) * np.where(r.z.argmax(1) == 0, 1, -1)[:, None]
    there = outputs(r.phi + away[:, None] * step, known)
    np.testing.assert_allclose(there[:, 0], there[:, 1], atol=1e-5)


def test_fdbd_leaves_out_a_class_without_a_boundary() -> None:
    known, r = head(), rows()
    twice = LinearHead(np.vstack([known.weight, known.weight[2]]), np.append(known.bias, -9.0))
    wider = Features(r.phi, outputs(r.phi, twice))
    state = fdbd.finish(fdbd.update(fdbd.init(C + 1, D), wider), twice)
    got = fdbd.score(state, wider.phi, wider.z)
    assert np.isfinite(got).all()
    third = r.z.argmax(1) == 2  # its others are the same three as before
    np.testing.assert_allclose(got[third], scores(fdbd, r, r)[third], rtol=1e-9)


@pytest.mark.parametrize("page", [fdbd, nci], ids=lambda p: p.INFO.name)
def test_a_row_at_the_mean_has_a_score(page: ModuleType) -> None:
    r, known = rows(), head()
    state = fitted(page, r)
    mean = state.tensors["mean"][None]
    middle = Features(mean, outputs(mean, known).astype(np.float32))
    want = page.score(state, middle.phi, middle.z)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(in_graph(page, state, middle), want, rtol=1e-5, atol=1e-5)


def test_nci_is_its_definition() -> None:
    r, fresh, w = rows(), rows(1, 80), head().weight
    mean = r.phi.mean(0)
    want = [
        -(w[z.argmax()] @ (x - mean)) / np.linalg.norm(x - mean) - 1e-4 * sum(abs(v) for v in x)
        for x, z in zip(fresh.phi, fresh.z, strict=True)
    ]
    np.testing.assert_allclose(scores(nci, r, fresh), want, rtol=1e-6, atol=1e-6)


@every
@pytest.mark.parametrize("shift", [100.0, 3e3])
def test_features_far_from_zero_are_scored_as_near(page: ModuleType, shift: float) -> None:
    r, known = rows(), head()
    near = Features(r.phi.astype(np.float32), r.z.astype(np.float32), r.y)
    far = Features(near.phi + np.float32(shift), near.z, r.y)
    moved = LinearHead(known.weight, known.bias - known.weight.sum(1) * shift)
    state = fitted(page, far, moved)
    want = page.score(state, far.phi, far.z)
    got = in_graph(page, state, far)
    # Of length one, such features differ in the fifth digit, and float32 has seven.
    tolerance = 3e-2 if page in (mds_l2, rmds_l2) else 1e-4
    assert np.max(np.abs(got - want) / np.maximum(1, np.abs(want))) <= tolerance
    if page in (mds, rmds, fdbd):  # no origin matters to them
        there = page.score(fitted(page, near), near.phi, near.z)
        np.testing.assert_allclose(want, there, rtol=2e-2, atol=1e-3 * np.abs(there).max())


@every
def test_what_cannot_be_fitted_is_told_by_name(page: ModuleType) -> None:
    r, name = rows(), page.INFO.name
    same = replace(r, phi=np.full((N, D), 0.1))
    with pytest.raises(FitError, match=f"{name}: every feature is constant"):
        fitted(page, same)
    with pytest.raises(FitError, match=f"{name} needs features; the model is a black box"):
        page.update(page.init(C, D), replace(r, phi=None))
    with pytest.raises(FitError, match=f"{name} met features that are not finite"):
        page.update(page.init(C, D), replace(r, phi=np.where(r.phi > 3, np.inf, r.phi)))
    if page in OF_CLASSES:
        with pytest.raises(FitError, match=f"{name} needs labels"):
            page.update(page.init(C, D), replace(r, y=None))
        return
    stats = page.update(page.init(C, D), r)
    with pytest.raises(FitError, match=f"{name} needs a linear head"):
        page.finish(stats, None)
    with pytest.raises(FitError, match=f"{name} needs a head of at least two classes"):
        page.finish(stats, head(classes=1))


def test_vim_refuses_outputs_that_are_not_finite() -> None:
    r = rows()
    with pytest.raises(FitError, match="vim met outputs that are not finite"):
        fitted(vim, replace(r, z=np.where(r.z > 5, np.nan, r.z)))


def test_fdbd_refuses_a_head_without_boundaries() -> None:
    known = LinearHead(np.ones((C, D)), np.arange(C) * 1.0)
    with pytest.raises(FitError, match="fdbd: the head says the same of every class"):
        fitted(fdbd, rows(), known)


def test_classes_of_single_rows_have_no_covariance() -> None:
    r = rows()
    few = Features(r.phi[:C], r.z[:C], np.arange(C))
    for page in OF_CLASSES:
        with pytest.raises(FitError, match=f"{page.INFO.name}: .* constant within every class"):
            fitted(page, few)
