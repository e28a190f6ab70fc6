"""A working directory with the networks, their weights and rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calibration.predictor import Predictor
from posthoc.links import softmax
from tests.calibration.network.nets import MODULE, NETS, fit, network_of


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: networks, their weights, and labelled rows."""
    path = tmp_path_factory.mktemp("networks")
    (path / f"{MODULE}.py").write_text(NETS)
    rng = np.random.default_rng(0)
    for kind, n, shape in (("table", 900, (5,)), ("values", 500, (5,)), ("maps", 320, (1, 6, 6))):
        net, x = network_of(kind), rng.normal(size=(n, *shape)).astype(np.float32)
        save_file(net.state_dict(), path / f"{kind}.safetensors")
        with torch.no_grad():
            z = net(torch.as_tensor(x)).numpy()
            if kind == "table":  # labels that the mixture explains better than the network
                for part in net:
                    part.train(isinstance(part, torch.nn.Dropout))
                many = [softmax(net(torch.as_tensor(x)).numpy()) for _ in range(64)]
                z = np.log(np.mean(many, axis=0))
        y = (z + rng.gumbel(size=z.shape)).argmax(1)
        if kind == "values":
            y = (z + rng.normal(size=z.shape)).astype(np.float32)
        if kind == "maps":
            y[rng.random(y.shape) < 0.2] = -1
            y[5] = -1  # nothing of this image is known
        np.savez(path / f"{kind}.npz", input=x, y=y)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def dropout(folder: Path) -> Predictor:
    return fit(folder, "table", "mc_dropout", "dropout", settings={"samples": 8})
