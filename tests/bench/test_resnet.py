"""The network of ResNet-18's shape."""

from __future__ import annotations

import numpy as np
import torch

from bench import resnet
from posthoc.contract import LinearHead


def test_it_has_the_size_of_the_papers_network() -> None:
    net = resnet.resnet18()
    assert sum(p.numel() for p in net.parameters()) == 11_689_512
    x = torch.from_numpy(resnet.images(1))
    with torch.no_grad():
        features, z = net[:-1](x), net(x)
    assert features.shape == (1, resnet.FEATURES)
    assert z.shape == (1, resnet.CLASSES)
    assert torch.isfinite(z).all()


def test_it_is_the_same_every_time_and_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    first, second = resnet.resnet18(), resnet.resnet18()
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_made_up_rows_belong_to_the_head() -> None:
    rng = np.random.default_rng(0)
    head = LinearHead(rng.standard_normal((5, 8)), rng.standard_normal(5))
    rows = resnet.rows(head, 2_000, seed=1)
    assert rows.phi is not None and rows.y is not None
    np.testing.assert_allclose(rows.z, rows.phi @ head.weight.T + head.bias, atol=1e-4)
    assert (rows.z.argmax(1) == rows.y).mean() > 0.5
    assert set(np.unique(rows.y)) == set(range(5))
