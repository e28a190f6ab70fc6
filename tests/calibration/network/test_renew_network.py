"""A bundle of a network-level module, renewed: its copies stay in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from calibration.bundle import load_bundle
from calibration.predictor import Predictor
from calibration.renew.renewal import renew
from calibration.renew.rows import Labelled, Window, id_keys
from calibration.renew.write import write_renewed
from posthoc.folds import log_softmax
from tests.calibration.network.nets import network_of


def test_a_mixture_of_copies_is_renewed(dropout: Predictor, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3000, 5)).astype(np.float32)
    with torch.no_grad():
        z = network_of("table")(torch.as_tensor(x)).numpy()
    y = (z / 4 + rng.gumbel(size=z.shape)).argmax(1)
    name = dropout.inputs[0].name
    out = dropout.run({name: x})
    rows = Labelled(
        id_keys([f"r{i}" for i in range(len(x))]),
        y,
        np.full(len(x), -1),
        label=out["label"],
        probs=out["probs"],
        confidence=out["confidence"].astype(float),
    )
    bundle = load_bundle(dropout.bundle.path)
    found = renew(bundle, rows, Window(0.0, 1.0, len(x), len(x)))
    assert found.factor is not None and found.factor.taken and found.comparison.publish
    new = write_renewed(found, tmp_path / "new", "2")
    now = Predictor(new).run({name: x})
    np.testing.assert_array_equal(now["label"], out["label"])
    want = np.exp(log_softmax(np.log(out["probs"].astype(float)) / found.factor.value))
    np.testing.assert_allclose(now["probs"], want, atol=1e-5)
    assert new.manifest.module == bundle.manifest.module
    assert (now["epistemic"] >= 0).all() and now["epistemic"].max() > 0
    share = now["set"][np.arange(len(x)), y].mean()
    first = new.manifest.conformal.guarantees[0]
    assert abs(share - first.exact) < 0.03
