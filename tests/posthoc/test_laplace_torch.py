"""Sampled weights against laplace-torch itself, and through a fit to a served bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from posthoc.contract import FitError, ModelError
from posthoc.laplace_torch import sample_weights


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs)).eval()


def rows(n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    return x, rng.integers(3, size=n)


@pytest.mark.parametrize(("weights", "curvature"), [("all", "kron"), ("subnetwork", "diag")])
def test_copies_run_as_the_network_with_the_drawn_weights(weights: str, curvature: str) -> None:
    net, (x, y) = network(), rows()
    made = sample_weights(
        net, x, y, task="classification", weights=weights, samples=3, curvature=curvature, seed=1
    )
    with torch.no_grad():
        z, members = made.module(torch.as_tensor(x))
        np.testing.assert_array_equal(z, net(torch.as_tensor(x)))
        for i, copied in enumerate(made.module.copies):
            first, _, last = (copied[j] for j in range(3))
            hidden = torch.tanh(torch.as_tensor(x) @ first.weight.T + first.bias)
            want = hidden @ last.weight.T + last.bias
            np.testing.assert_allclose(members[:, 3 * i : 3 * i + 3], want, atol=1e-5)
    spread = members.reshape(len(x), 3, 3).std(1)
    assert float(spread.mean()) > 0.01
    assert made.facts["parameters"] == sum(p.numel() for p in net.parameters())


def test_the_seed_is_explicit() -> None:
    x, y = rows()
    how = {"task": "classification", "weights": "all", "samples": 2, "curvature": "diag"}
    a, b, c = (
        torch.nn.utils.parameters_to_vector(
            sample_weights(network(), x, y, seed=seed, **how).module.copies[0].parameters()
        ).detach()
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_the_linearised_predictive_of_a_linear_regression_is_bayes() -> None:
    """One linear layer is linear in its weights: the predictive is Bayesian linear regression."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    y = x @ rng.normal(size=(4, 1)) + 0.3 * rng.normal(size=(200, 1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    net[0].weight.data = torch.as_tensor(np.linalg.lstsq(x, y, rcond=None)[0].T.astype(np.float32))
    made = sample_weights(net, x, y, task="regression", weights="all", samples=2, curvature="full")
    mean, variance = made.linearised(x[:7])
    residual = y - x @ net[0].weight.data.numpy().T
    noise = float((residual**2).mean())
    precision = x.T @ x / noise + made.facts["prior_precision"] * np.eye(4)
    want = np.einsum("ni,ij,nj->n", x[:7], np.linalg.inv(precision), x[:7]) + noise
    np.testing.assert_allclose(mean[:, 0], (x[:7] @ net[0].weight.data.numpy().T)[:, 0], atol=1e-5)
    np.testing.assert_allclose(variance[:, 0], want, rtol=1e-3)


def test_too_many_numbers_name_the_limit() -> None:
    x, y = rows()
    with pytest.raises(ModelError, match=r"4 samples of 75 weights are 300 numbers.*limit of 100"):
        sample_weights(
            network(), x, y, task="classification", weights="all", samples=4, max_numbers=100
        )


def test_what_laplace_torch_cannot_do_is_said() -> None:
    x, y = rows()
    odd = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    with pytest.raises(FitError, match="laplace-torch cannot fit kron curvature over all weights"):
        sample_weights(odd, x, y, task="classification", weights="all")
    with pytest.raises(FitError, match="at least 2"):
        sample_weights(network(), x, y, task="classification", weights="all", samples=1)
    soft = nn.Sequential(network(), nn.Softmax(1)).eval()
    with pytest.raises(ModelError, match="gives logits"):
        sample_weights(soft, x, y, task="classification", weights="all", curvature="diag")
