"""Fits at the size of an ImageNet head stay under a gigabyte."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from posthoc.contract import Features, LinearHead
from tests.posthoc.methods.laplace.material import PAGES, fitted

C, D, N = 1_000, 2_048, 64


@pytest.mark.parametrize("structure", ["kron", "diag", "identity"])
def test_an_imagenet_head_fits_in_a_gigabyte(structure: str) -> None:
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(C, D)) / 50, np.zeros(C))
    phi = rng.random((N, D), dtype=np.float32)
    rows = Features(phi, (phi @ head.weight.T).astype(np.float32))
    tracemalloc.start()
    try:
        state = fitted(PAGES[structure], head, rows, prior_precision=1.0)
        spread = PAGES[structure].spread(state, phi[:4], rows.z[:4])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1e9
    assert np.isfinite(spread.variance).all() and spread.variance.min() > 0
