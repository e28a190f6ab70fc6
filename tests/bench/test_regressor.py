"""The frozen regressor: what it is, how good it is, and that it is made the same every time."""

from __future__ import annotations

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import r2_score

from bench import regressor as source
from posthoc.runtime import open_session


@pytest.fixture(scope="module")
def made() -> source.Regressor:
    return source.regressor()


def test_it_predicts_rows_it_never_saw(made: source.Regressor) -> None:
    train, data = pq.read_table(made.train), pq.read_table(made.data)
    assert train.column_names == data.column_names == [*source.INPUTS, source.TARGET]
    x, y = source.matrix(data)
    session = open_session(made.model)
    predictions = session.run(None, {"features": x})[0]
    assert predictions.shape == y.shape == (data.num_rows, 1)
    assert r2_score(y, predictions) > 0.98
    seen = {tuple(row) for row in np.column_stack(source.matrix(train)).tolist()}
    unseen = {tuple(row) for row in np.column_stack((x, y)).tolist()}
    assert len(seen) == train.num_rows
    assert not seen & unseen


def test_the_graph_ends_in_a_linear_head(made: source.Regressor) -> None:
    graph = onnx.load(made.model).graph
    last = next(n for n in graph.node if graph.output[0].name in n.output)
    assert last.op_type == "Gemm"
    assert [i.name for i in graph.input] == ["features"]


def test_training_is_repeatable_and_leaves_no_trace() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, (600, 9)).astype(np.float32)
    y = (x[:, :1] * 2 - x[:, 1:2] + 7).astype(np.float32)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    first, second = source.network(x, y), source.network(x, y)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert r2_score(y, first(torch.from_numpy(x)).numpy()) > 0.8  # back in the target's units
