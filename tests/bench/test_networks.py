"""Networks trained here: what they learn, how sure they become, that they come out the same."""

from __future__ import annotations

import numpy as np
import onnx
import pyarrow as pa
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

from bench import networks
from bench.networks import Recipe
from posthoc.frozen import open_frozen
from posthoc.runtime import open_session


def _noisy(n: int, seed: int, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that no rule can always tell apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(10, 4, (n, width)).astype(np.float32)
    scores = np.stack([x[:, 0], x[:, 1], x[:, 2]], 1) / 4 + rng.gumbel(size=(n, 3))
    return x, scores.argmax(1).astype(np.int64)


def test_a_head_alone_is_logistic_regression() -> None:
    x, y = _noisy(400, 0)
    net = networks.train(x, y, Recipe(hidden=(), epochs=300, batch=400, rate=0.05))
    z = torch.log_softmax(net(torch.from_numpy(x)), 1).numpy()
    peer = LogisticRegression(C=1e6, max_iter=1000).fit((x - 10) / 4, y)
    want = peer.predict_log_proba((x - 10) / 4)
    assert np.abs(z - want).max() < 0.01


def test_a_head_alone_is_linear_regression() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (300, 4)).astype(np.float32)
    y = (x @ rng.normal(0, 50, (4, 2)) + [1000, -5] + rng.normal(size=(300, 2))).astype(np.float32)
    net = networks.train(x, y, Recipe(hidden=(), epochs=400, batch=300, rate=0.05))
    want = LinearRegression().fit(x, y).predict(x)
    assert np.abs(net(torch.from_numpy(x)).numpy() - want).max() < 0.01 * y.std()


def test_trained_long_it_is_over_confident() -> None:
    x, y = _noisy(200, 0, width=20)
    net = networks.train(x, y, Recipe(epochs=100, batch=50))
    assert (net(torch.from_numpy(x)).numpy().argmax(1) == y).mean() > 0.97
    others, truth = _noisy(2000, 1, width=20)
    p = net(torch.from_numpy(others)).softmax(1).numpy()
    assert p.max(1).mean() > (p.argmax(1) == truth).mean() + 0.2


def test_the_same_rows_give_the_same_network_and_leave_no_trace() -> None:
    x, y = _noisy(100, 0)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    first, second, other = (
        networks.train(x, y, Recipe(hidden=(8,), epochs=3, seed=s)) for s in (0, 0, 1)
    )
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)
    assert not any(a.requires_grad for a, _, _ in pairs)


def test_constant_columns_stay_finite() -> None:
    x, y = _noisy(50, 0)
    x[:, 2] = 7
    assert torch.isfinite(networks.train(x, y, Recipe(epochs=2))(torch.from_numpy(x))).all()
    flat = np.full((50, 1), 3, np.float32)
    got = networks.train(x, flat, Recipe(epochs=2))(torch.from_numpy(x))
    assert torch.isfinite(got).all()


def test_the_export_has_a_head_that_is_found() -> None:
    x, y = _noisy(90, 0)
    net = networks.train(x, y, Recipe(hidden=(16, 12), epochs=2))
    model = networks.export(net, x, "features")
    assert [i.name for i in onnx.load_from_string(model).graph.input] == ["features"]
    frozen = open_frozen(model, task="classification")
    assert frozen.head is not None
    assert frozen.head.weight.shape == (3, 12)
    got = open_session(model).run(None, {"features": x})[0]
    assert np.allclose(got, net(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-4)


def test_matrix_of_columns_and_of_one_list() -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    columns = {"c": pa.array(x[:, 2].astype(np.int64)), "a": pa.array(x[:, 0])}
    assert np.array_equal(networks.matrix(pa.table(columns), ["a", "c"]), x[:, [0, 2]])
    listed = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 3)
    table = pa.table({"v": pa.chunked_array([listed[:1], listed[1:]])})
    assert np.array_equal(networks.matrix(table, ["v"]), x)
    assert np.array_equal(networks.matrix(table.slice(1), ["v"]), x[1:])
