"""The two sides of the Laplace benchmarks do the same work: same posterior, same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.laplace import problem
from bench.peers import Worker

N, D, C = 60, 7, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("laplace") / "rows.npz"
    problem(N, D, C).save(path)
    return path


@pytest.fixture(scope="module")
def peer() -> Iterator[Worker]:
    # The tests' own environment holds the library too, as their oracle.
    with Worker.here("bench.laplace_torch") as made:
        yield made


@pytest.fixture(scope="module")
def ours() -> Iterator[Worker]:
    with Worker.here("bench.applied") as made:
        yield made


def answer(side: Worker, path: Path, structure: str, dtype: str, what: str) -> np.ndarray:
    side.call("load", path=str(path), dtype=dtype)
    assert side.call("fit", structure=structure, prior_precision=1.3) > 0
    if dtype == "float32":
        assert side.call("predict", what=what, rows=5) > 0
    target = path.with_name("answer.npz")
    side.call("answer", what=what, rows=9, path=str(target))
    with np.load(target) as data:
        return np.asarray(data["value"])


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_both_sides_give_the_same_probabilities(
    path: Path, peer: Worker, ours: Worker, structure: str
) -> None:
    exact = answer(peer, path, structure, "float64", "probs")
    assert exact.shape == (9, C)
    np.testing.assert_allclose(
        answer(ours, path, structure, "float64", "probs"), exact, rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(
        answer(ours, path, structure, "float32", "probs"), exact, rtol=0, atol=1e-5
    )


def test_both_sides_give_the_same_covariance(path: Path, peer: Worker, ours: Worker) -> None:
    exact = answer(peer, path, "kron", "float64", "covariance")
    assert exact.shape == (9, C, C)
    served = answer(ours, path, "kron", "float32", "covariance")
    np.testing.assert_allclose(served, exact, rtol=1e-4, atol=1e-5)


def test_the_fast_path_of_the_peer_is_its_usual_answer(path: Path, peer: Worker) -> None:
    usual = answer(peer, path, "diag", "float64", "probs")
    np.testing.assert_allclose(
        answer(peer, path, "diag", "float64", "diagonal"), usual, rtol=0, atol=1e-12
    )


def test_the_batch_and_the_backend_do_not_change_the_peers_posterior(
    path: Path, peer: Worker
) -> None:
    want = answer(peer, path, "diag", "float64", "probs")
    target = path.with_name("again.npz")
    for batch, backend in ((7, "default"), (60, "backpack")):
        peer.call("fit", structure="diag", prior_precision=1.3, batch=batch, backend=backend)
        peer.call("answer", what="probs", rows=9, path=str(target))
        with np.load(target) as data:
            np.testing.assert_allclose(data["value"], want, rtol=0, atol=1e-9)


def test_the_problem_is_what_both_need() -> None:
    made = problem(N, D, C)
    assert made.phi.dtype == np.float32
    assert made.phi.shape == (N, D)
    np.testing.assert_allclose(made.weight.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(made.bias.mean(), 0, atol=1e-12)
    assert set(np.unique(made.y)) <= set(range(C))
    again = problem(N, D, C)
    assert all(np.array_equal(getattr(made, k), getattr(again, k)) for k in ("phi", "weight", "y"))
