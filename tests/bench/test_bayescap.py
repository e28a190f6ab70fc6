"""The figures of the BayesCap benchmark on small material."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import bayescap
from posthoc.methods.bayescap.image import Settings


def test_the_released_loss_does_not_see_beta() -> None:
    normal, laplace = (bayescap.released_constants(n) for n in ("normal", "laplace"))
    assert normal["beta"] == pytest.approx(0.684, abs=0.001)
    assert laplace["beta"] == pytest.approx(0.684, abs=0.001)
    assert normal["variance_ratio"] == pytest.approx(3.3, abs=0.1)
    assert laplace["variance_ratio"] == pytest.approx(2.6, abs=0.1)


def test_the_released_loss_is_the_product() -> None:
    r, alpha, beta = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 1.3, 0.8))
    want = 0.7 / 1.3 * 0.8 - np.log(0.8 / 1.3) + float(torch.lgamma(1 / beta))
    assert float(bayescap.released(r.log(), alpha.log(), beta.log())) == pytest.approx(want)


def test_a_cap_recovers_what_the_noise_is() -> None:
    found = bayescap.recovered("laplace", [0])
    assert found["beta_error"] < 0.05 and found["variance_error"] < 0.05


def test_the_figures_of_a_dense_task() -> None:
    rng = np.random.default_rng(0)

    def maps(n: int) -> tuple[np.ndarray, np.ndarray]:
        z = np.repeat(np.repeat(rng.normal(size=(n, 1, 4, 4)), 6, 2), 6, 3)
        noise = rng.normal(size=z.shape) * np.exp(0.7 * z)
        return z.astype(np.float32), (z + noise).astype(np.float32)

    settings = Settings(channels=6, blocks=0, crop=18, steps=300, learning_rate=1e-2, patience=9)
    found = bayescap.dense(maps(30), maps(12), settings)
    assert found["uce_ratio"] < 0.5
    assert found["nll_difference_interval"][1] < 0
    assert found["ause"] < 0.7 * found["ause_random"]
    assert found["correlation"] > 0.3
