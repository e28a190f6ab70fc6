"""Every structure of the curvature against dense algebra and sampling."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc import links, registry
from posthoc.contract import DataError, Features, FitError, LinearHead
from posthoc.methods.laplace import diag, full, identity, kron
from posthoc.rows import of, take
from tests.posthoc.methods.laplace.material import (
    PAGES,
    C,
    D,
    N,
    covariance,
    dense_covariance,
    fitted,
    material,
    mean_difference,
    outputs,
    summed,
    with_one,
)

structures = pytest.mark.parametrize("structure", PAGES)
PRECISION = 1.7


def shapes(structure: str) -> list[dict[str, object]]:
    if structure == "identity":
        return [{}]
    return [{"fold_bias": b, "fisher": f} for b in (True, False) for f in ("ggn", "empirical")]


@pytest.mark.parametrize(
    ("structure", "given"), [(s, g) for s in PAGES for g in shapes(s)], ids=str
)
def test_dense_algebra_gives_the_same_covariance(structure: str, given: dict[str, object]) -> None:
    head, rows = material()
    page, folded = PAGES[structure], bool(given.get("fold_bias", True))
    state = fitted(page, head, rows, prior_precision=PRECISION, **given)
    sigma = dense_covariance(structure, rows, PRECISION, str(given.get("fisher", "ggn")), folded)
    few = take(rows, slice(0, 5))
    want = outputs(sigma, few.phi, C, folded)
    np.testing.assert_allclose(page.joint(state, few.phi), want, atol=1e-10)
    spread = page.spread(state, few.phi, few.z)
    own = np.einsum("icid->icd", want)
    if structure != "full":
        np.testing.assert_allclose(covariance(spread), own, atol=1e-10)
    np.testing.assert_allclose(links.class_variance(spread), np.einsum("ncc->nc", own), atol=1e-10)
    pairs = [mean_difference(v) for v in own]
    np.testing.assert_allclose(spread.variance, pairs, atol=1e-10)


@structures
def test_two_classes_are_the_variance_of_their_difference(structure: str) -> None:
    head, rows = material(c=2)
    state = fitted(PAGES[structure], head, rows, prior_precision=PRECISION)
    sigma = dense_covariance(structure, rows, PRECISION)
    spread = PAGES[structure].spread(state, rows.phi[:3], rows.z[:3])
    for i, x in enumerate(with_one(rows.phi[:3])):
        apart = np.concatenate([x, -x])
        assert spread.variance[i] == pytest.approx(apart @ sigma @ apart, rel=1e-9)


@structures
def test_sampled_weights_have_the_same_predictive(structure: str) -> None:
    head, rows = material(n=60)
    state = fitted(PAGES[structure], head, rows, prior_precision=PRECISION)
    sigma = dense_covariance(structure, rows, PRECISION)
    few = take(rows, slice(0, 8))
    rng = np.random.default_rng(0)
    theta = rng.multivariate_normal(np.zeros(len(sigma)), sigma, 20_000).reshape(-1, C, D + 1)
    logits = few.z[:, None] + np.einsum("sck,nk->nsc", theta, with_one(few.phi))
    want = links.softmax(logits).mean(1)
    if structure == "full":
        state = fitted(PAGES[structure], head, rows, prior_precision=PRECISION, draws=4_096)
    spread = PAGES[structure].spread(state, few.phi, few.z)
    eps = links.normal_draws(len(spread.directions), 1, 4_096) if structure != "full" else None
    got = np.exp(links.log_probs(few.z, spread, 1.0, 1.0, "mc", eps))
    np.testing.assert_allclose(got, want, atol=0.012)


def test_draws_of_the_full_posterior_follow_their_seed() -> None:
    head, rows = material()
    few = rows.phi[:4]
    a, b, other = (
        full.spread(fitted(full, head, rows, seed=s, draws=8), few, rows.z[:4]) for s in (1, 1, 2)
    )
    assert a.draws.shape == (4, 8, C)
    np.testing.assert_array_equal(a.draws, b.draws)
    assert np.abs(a.draws - other.draws).max() > 0.01
    np.testing.assert_allclose(a.draws.mean(1), 0.0, atol=1e-12)
    np.testing.assert_array_equal(a.variance, other.variance)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("folded", [True, False])
def test_regression_is_bayesian_linear_regression(structure: str, folded: bool) -> None:
    if structure == "full" and not folded:
        return
    head, rows = material("regression")
    given = {} if structure == "full" else {"fold_bias": folded}
    state = fitted(PAGES[structure], head, rows, "regression", **given)
    noise = np.asarray(state.settings["noise_variance"])
    phi = with_one(rows.phi)
    gram = phi.T @ phi
    if structure == "diag":
        gram = np.diag(np.diag(gram))
    elif not folded:
        gram[-1, :-1] = gram[:-1, -1] = 0
    spread = PAGES[structure].spread(state, rows.phi, rows.z)
    joint = PAGES[structure].joint(state, rows.phi[:3])
    for k in range(C):
        sigma = np.linalg.inv(gram / noise[k] + state.settings["prior_precision"] * np.eye(D + 1))
        want = np.einsum("ni,ij,nj->n", phi, sigma, phi)
        np.testing.assert_allclose(spread.variance[:, k], want, rtol=1e-8)
        np.testing.assert_allclose(joint[:, k, :, k], phi[:3] @ sigma @ phi[:3].T, atol=1e-10)
    assert np.abs(joint[:, 0, :, 1]).max() < 1e-12
    np.testing.assert_allclose(noise, 1.0, atol=0.3)


def test_identity_regression_is_in_units_of_the_noise() -> None:
    head, rows = material("regression")
    state = fitted(identity, head, rows, "regression", prior_precision=50.0)
    noise = ((rows.y - rows.z) ** 2).mean(0)
    want = ((rows.phi**2).sum(1) + 1)[:, None] * noise / 50.0
    np.testing.assert_allclose(identity.spread(state, rows.phi, rows.z).variance, want, rtol=1e-12)
    joint = identity.joint(state, rows.phi[:3])
    np.testing.assert_allclose(np.einsum("ncnc->nc", joint), want[:3], rtol=1e-12)
    scale = np.asarray([1.0, 10.0, 0.1, 3.0])  # other units of each output, and the same answer
    scaled = Features(rows.phi, rows.z * scale, rows.y * scale)
    other = LinearHead(head.weight * scale[:, None], head.bias * scale)
    again = fitted(identity, other, scaled, "regression")
    first = fitted(identity, head, rows, "regression")
    assert again.settings["prior_precision"] == pytest.approx(first.settings["prior_precision"])


def test_identity_with_no_precision_ranks_by_the_angle() -> None:
    head, rows = material(c=2)
    state = fitted(identity, head, rows, prior_precision=1e-6)
    spread = identity.spread(state, rows.phi, rows.z)
    p = np.exp(links.log_probs(rows.z, spread, 1.0, 1.0))[:, 0]
    angle = (rows.z[:, 0] - rows.z[:, 1]) / np.sqrt((rows.phi**2).sum(1) + 1)
    np.testing.assert_array_equal(p.argsort(), angle.argsort())


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_train_rows_rescale_the_curvature(structure: str) -> None:
    head, rows = material()
    page = PAGES[structure]
    stats, settings = summed(page, head, rows, "classification", prior_precision=2.0)
    want = page.finish(page.merge(stats, stats), head, settings)
    got = page.finish(stats, head, page.Settings(prior_precision=2.0, train_rows=2 * N))
    np.testing.assert_allclose(
        page.joint(got, rows.phi[:5]), page.joint(want, rows.phi[:5]), rtol=1e-8, atol=1e-12
    )


@structures
def test_a_posterior_does_not_depend_on_a_common_shift_of_logits(structure: str) -> None:
    head, rows = material()
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=D), rng.normal()
    shifted = LinearHead(head.weight + weight, head.bias + bias)
    moved = Features(rows.phi, rows.z + (rows.phi @ weight + bias)[:, None], rows.y)
    a, b = fitted(PAGES[structure], head, rows), fitted(PAGES[structure], shifted, moved)
    assert a.settings["prior_precision"] == pytest.approx(b.settings["prior_precision"], rel=1e-6)
    x = rows.phi[:5]
    np.testing.assert_allclose(
        PAGES[structure].joint(a, x), PAGES[structure].joint(b, x), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_sure_model_keeps_its_curvature_in_float32(structure: str) -> None:
    """p (1 - p) as it is written loses every digit from 1 - p = 1e-8 on."""
    head, rows = material()
    sure = Features(rows.phi, rows.z + 18 * np.eye(C)[rows.z.argmax(1)], rows.y)
    single = Features(sure.phi.astype(np.float32), sure.z.astype(np.float32), sure.y)
    double = Features(single.phi.astype(np.float64), single.z.astype(np.float64), sure.y)
    page = PAGES[structure]
    few = single.phi[:5]
    got, want = (
        page.joint(fitted(page, head, r, prior_precision=1e-8), few) for r in (single, double)
    )
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())


def test_long_blocks_are_summed_in_parts() -> None:
    rng = np.random.default_rng(0)
    head, _ = material()
    phi = (rng.normal(size=(20_000, D)) + 3).astype(np.float32)
    rows = Features(phi, (phi @ head.weight.T + head.bias).astype(np.float32))
    stats, _ = summed(kron, head, rows, "classification")
    exact = with_one(phi.astype(np.float64))
    np.testing.assert_allclose(stats.gram, exact.T @ exact, rtol=1e-6, atol=0.02)
    assert stats.gram[-1, -1] == 20_000
    of_diag, _ = summed(diag, head, rows, "classification")
    p = links.softmax(rows.z)
    want = (p * (1 - p)).T @ exact**2
    np.testing.assert_allclose(of_diag.curvature, want, rtol=1e-5)


def test_a_large_head_is_refused_by_the_full_curvature() -> None:
    head = LinearHead(np.zeros((100, 64)), np.zeros(100))
    with pytest.raises(FitError, match=r"6500 parameters and the limit is 5000 .*laplace_diag"):
        full.init(head, "classification", full.Settings())
    full.init(head, "classification", full.Settings(max_parameters=6_500))
    full.init(head, "regression", full.Settings())


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "identity"])
def test_unusable_labels_are_named(structure: str) -> None:
    head, rows = material("regression")
    page = PAGES[structure]

    def fit(y: np.ndarray | None) -> None:
        fitted(page, head, Features(rows.phi, rows.z, y), "regression", prior_precision=1.0)

    with pytest.raises(FitError, match="labels for the noise"):
        fit(None)
    with pytest.raises(FitError, match="without error"):
        fit(rows.z)
    with pytest.raises(FitError, match="labels of shape"):
        fit(rows.y[:, :1])
    bad = rows.y.copy()
    bad[3, 1] = np.nan
    with pytest.raises(FitError, match="not finite"):
        fit(bad)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_empirical_fisher_matrix_needs_labels_of_classes(structure: str) -> None:
    head, rows = material()
    page = PAGES[structure]
    with pytest.raises(FitError, match="empirical needs labels"):
        fitted(page, head, Features(rows.phi, rows.z), fisher="empirical")
    with pytest.raises(DataError, match="label 9 is not a class"):
        fitted(page, head, Features(rows.phi, rows.z, np.full(N, 9)), fisher="empirical")
    with pytest.raises(FitError, match="for classification"):
        page.init(head, "regression", page.Settings(fisher="empirical"))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("laplace", {"epsilon": 0.1}, "belongs to prior=epsilon"),
        ("laplace", {"epsilon": 0.1, "prior": "heldout"}, "belongs to prior=epsilon"),
        ("laplace_diag", {"prior_precision": 1.0, "prior": "heldout"}, "leave the rule out"),
        ("icla", {"prior": "evidence"}, "heldout"),
        ("icla", {"fisher": "ggn"}, "no setting 'fisher'"),
        ("laplace", {"draws": 8}, "no setting 'draws'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    name: str, given: dict[str, object], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        registry.settings(name, given)


@pytest.mark.parametrize("given", [{"draws": 8}, {"seed": 3}, {"fold_bias": False}])
def test_a_full_regression_refuses_what_it_has_no_use_for(given: dict[str, object]) -> None:
    head, rows = material("regression")
    with pytest.raises(FitError, match="has no use for"):
        registry.fit("laplace_full", head, "regression", of(rows), given)
