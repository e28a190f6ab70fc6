"""The closed-form Laplace against dense algebra, sampling, and laplace-torch in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from posthoc.contract import Features, FitError, LinearHead
from posthoc.folds import log_softmax
from posthoc.links import Spread, softmax
from posthoc.methods import laplace
from posthoc.methods.laplace import Settings

D, C, N = 6, 4, 300


def material(task: str = "classification") -> tuple[LinearHead, Features]:
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(C, D)), rng.normal(size=C))
    phi = rng.normal(size=(N, D))
    z = phi @ head.weight.T + head.bias
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    return head, Features(phi, z, y if task == "classification" else z + rng.normal(size=z.shape))


def covariance(spread: Spread) -> np.ndarray:
    """Output covariance N×C×C of a spread."""
    root = spread.amplitude[:, :, None] * spread.directions[None]
    return np.einsum("nri,nrj->nij", root, root)


def test_dense_algebra_gives_the_same_covariance() -> None:
    head, rows = material()
    state = laplace.finish(
        laplace.update(laplace.init(head, "classification", Settings()), rows), head, Settings()
    )
    phi = np.concatenate([rows.phi, np.ones((N, 1))], 1)
    p = softmax(rows.z)
    curvature = sum(np.diag(q) - np.outer(q, q) for q in p) / N
    hessian = np.kron(curvature, phi.T @ phi)
    precision = state.settings["prior_precision"]
    sigma = np.linalg.inv(hessian + precision * np.eye(len(hessian)))
    centring = np.eye(C) - 1 / C
    spread = laplace.spread(state, rows.phi, rows.z)
    for i in range(5):
        jacobian = np.kron(np.eye(C), phi[i])
        want = centring @ (jacobian @ sigma @ jacobian.T) @ centring
        np.testing.assert_allclose(covariance(spread)[i], want, atol=1e-9)
        pairs = [
            want[a, a] + want[b, b] - 2 * want[a, b] for a in range(C) for b in range(C) if a != b
        ]
        assert spread.variance[i] == pytest.approx(np.mean(pairs), abs=1e-9)


def test_the_prior_precision_maximises_the_evidence() -> None:
    head, rows = material()
    centred = LinearHead(head.weight - head.weight.mean(0), head.bias - head.bias.mean())
    stats = laplace.update(laplace.init(centred, "classification", Settings()), rows)
    state = laplace.finish(stats, centred, Settings())
    best = state.settings["prior_precision"]
    low, high = laplace.PRECISION_BOUNDS
    assert low * 10 < best < high / 10
    at = [laplace.log_evidence(stats, centred, best * f, 0.0) for f in (0.98, 1.0, 1.02)]
    assert at[1] > at[0] and at[1] > at[2]


def test_regression_is_bayesian_linear_regression() -> None:
    head, rows = material("regression")
    state = laplace.finish(
        laplace.update(laplace.init(head, "regression", Settings()), rows), head, Settings()
    )
    noise = np.asarray(state.settings["noise_variance"])
    phi = np.concatenate([rows.phi, np.ones((N, 1))], 1)
    spread = laplace.spread(state, rows.phi, rows.z)
    for k in range(C):
        precision = phi.T @ phi / noise[k] + state.settings["prior_precision"] * np.eye(D + 1)
        want = np.einsum("ni,ij,nj->n", phi, np.linalg.inv(precision), phi)
        np.testing.assert_allclose(spread.variance[:, k], want, rtol=1e-8)
    np.testing.assert_allclose(noise, 1.0, atol=0.3)


def test_train_rows_rescale_the_curvature() -> None:
    head, rows = material()
    stats = laplace.update(laplace.init(head, "classification", Settings()), rows)
    doubled = laplace.merge(stats, stats)
    want = laplace.finish(doubled, head, Settings(prior_precision=2.0))
    got = laplace.finish(stats, head, Settings(prior_precision=2.0, train_rows=2 * N))
    np.testing.assert_allclose(
        laplace.spread(got, rows.phi, rows.z).variance,
        laplace.spread(want, rows.phi, rows.z).variance,
        rtol=1e-9,
    )


def test_unusable_rows_are_named() -> None:
    head, rows = material("regression")
    stats = laplace.init(head, "regression", Settings())
    with pytest.raises(FitError, match="labels for the noise"):
        laplace.finish(laplace.update(stats, Features(rows.phi, rows.z)), head, Settings())
    with pytest.raises(FitError, match="without error"):
        laplace.finish(laplace.update(stats, Features(rows.phi, rows.z, rows.z)), head, Settings())
    flat = LinearHead(np.ones((C, D)), np.ones(C))
    _, classes = material()
    with pytest.raises(FitError, match="all equal"):
        laplace.finish(
            laplace.update(laplace.init(flat, "classification", Settings()), classes),
            flat,
            Settings(),
        )


@pytest.fixture(scope="module")
def oracle():  # type: ignore[no-untyped-def]
    """laplace-torch's Kronecker last-layer posterior of the same head, in float64."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import KronLLLaplace

        torch.manual_seed(0)
        head, rows = material()
        net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(D, C)).double()
        with torch.no_grad():
            net[1].weight.copy_(torch.from_numpy(head.weight))
            net[1].bias.copy_(torch.from_numpy(head.bias))
        data = torch.utils.data.TensorDataset(torch.from_numpy(rows.phi), torch.from_numpy(rows.y))
        la = KronLLLaplace(net, "classification", last_layer_name="1", prior_precision=1.7)
        la.fit(torch.utils.data.DataLoader(data, batch_size=N))
        x = torch.from_numpy(rows.phi)
        probs = la(x, pred_type="glm", link_approx="probit").detach().numpy()
        evidence = float(la.log_marginal_likelihood())
    return head, rows, probs, evidence


def test_laplace_torch_agrees(oracle) -> None:  # type: ignore[no-untyped-def]
    head, rows, probs, evidence = oracle
    stats = laplace.update(laplace.init(head, "classification", Settings(fold_bias=False)), rows)
    state = laplace.finish(stats, head, Settings(prior_precision=1.7, fold_bias=False))
    variance = np.einsum("nii->ni", covariance(laplace.spread(state, rows.phi, rows.z)))
    got = softmax(rows.z / np.sqrt(1 + np.pi / 8 * variance))
    np.testing.assert_allclose(got, probs, atol=1e-5)
    log_likelihood = float(log_softmax(rows.z)[np.arange(N), rows.y].sum())
    ours = laplace.log_evidence(stats, head, 1.7, log_likelihood)
    assert ours == pytest.approx(evidence, rel=1e-5)
