"""Runs over bound buffers against plain runs of the same session, and when each is chosen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper

from calibration.predictor import Predictor
from posthoc.binding import BoundRun, choose_run, on_device, pinned
from posthoc.runtime import CPU, CUDA, TENSORRT, choose_providers, cuda_device_count, open_session
from tests.factory import rows

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not cuda_device_count(), reason="no NVIDIA device")
ROWS = {"twice", "mask", "wide", "index"}


def several_outputs() -> bytes:
    """x float32 [N,3], k int64 [N] → outputs of four types, one of an unknown number of rows."""
    f, b, i, d = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64, TensorProto.DOUBLE
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Greater", ["x", "twice"], ["mask"]),
        helper.make_node("Cast", ["x"], ["wide"], to=d),
        helper.make_node("Add", ["k", "k"], ["index"]),
        helper.make_node("Compress", ["x", "keep"], ["kept"], axis=0),
        helper.make_node("Greater", ["k", "zero"], ["keep"]),
    ]
    nodes[-2:] = nodes[:-3:-1]
    outputs = [("twice", f, ["N", 3]), ("mask", b, ["N", 3]), ("wide", d, ["N", 3])]
    outputs += [("index", i, ["N"]), ("kept", f, ["M", 3])]
    graph = helper.make_graph(
        nodes,
        "several",
        [
            helper.make_tensor_value_info("x", f, ["N", 3]),
            helper.make_tensor_value_info("k", i, ["N"]),
        ],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [helper.make_tensor("zero", i, [1], [0])],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def feed(n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(n, 3)).astype(np.float32), "k": rng.integers(-2, 3, n)}


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_bound_run_gives_what_a_plain_run_gives() -> None:
    session = open_session(several_outputs(), threads=1)
    sizes: list[int] = []

    def allocate(size: int) -> np.ndarray:
        sizes.append(size)
        return np.empty(size, np.uint8)

    bound = BoundRun(session, ROWS, allocate)
    every = [o.name for o in session.get_outputs()]
    kept = []
    for seed, n in enumerate([1, 64, 7, 0, 64, 300, 1]):
        for names in (every, every[::-1], ["mask"], ["kept", "twice"]):
            values = feed(n, seed)
            wanted = session.run(names, values)
            found = bound.run(names, values)
            assert_same(found, wanted)
            kept.append((found, wanted))
    for found, wanted in kept:  # no later run wrote over an earlier answer
        assert_same(found, wanted)
    assert len(sizes) <= 5


def test_threads_do_not_write_over_each_other() -> None:
    session = open_session(several_outputs(), threads=1)
    bound = BoundRun(session, ROWS, lambda size: np.empty(size, np.uint8))
    cases = [feed(5 + seed, seed) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: bound.run(["twice", "index"], case), cases))
    for case, (twice, index) in zip(cases, found, strict=True):
        np.testing.assert_array_equal(twice, 2 * case["x"])
        np.testing.assert_array_equal(index, 2 * case["k"])


def test_an_error_of_a_bound_run_is_one_and_the_next_run_works() -> None:
    session = open_session(several_outputs(), threads=1)
    bound = BoundRun(session, ROWS, lambda size: np.empty(size, np.uint8))
    values = feed(4, 0)
    with pytest.raises(Exception, match="no_such_output"):
        bound.run(["no_such_output"], values)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        bound.run(["twice"], {**values, "x": np.zeros((4, 2), np.float32)})
    assert_same(bound.run(["twice"], values), session.run(["twice"], values))


@pytest.mark.parametrize(
    ("device", "available", "bound"),
    [
        ("cpu", [TENSORRT, CUDA, CPU], False),
        ("auto", [CPU], False),
        ("auto", [TENSORRT, CUDA, CPU], True),
        ("cuda:1", [CUDA, CPU], True),
        ("tensorrt", [TENSORRT, CPU], True),
    ],
)
def test_device_sessions_run_bound_and_cpu_sessions_do_not(device, available, bound) -> None:
    providers = [p if isinstance(p, str) else p[0] for p in choose_providers(device, available)]
    assert on_device(providers) == bound
    assert not on_device([])


def test_a_cpu_session_is_run_plainly() -> None:
    session = open_session(several_outputs(), threads=1)
    values = feed(3, 0)
    found = choose_run(session, ROWS)(["wide", "kept"], values)
    assert_same(found, session.run(["wide", "kept"], values))


@gpu
@no_gpu
def test_pinned_memory_is_memory_that_cuda_knows() -> None:
    memory = pinned(4096)
    memory[:] = 7
    assert memory.sum() == 7 * 4096 and memory.base is not None


@gpu
@no_gpu
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_bound_and_plain_runs_are_equal_on_the_device(
    task, classification_bundle, regression_bundle
) -> None:
    bundle = classification_bundle if task == "classification" else regression_bundle
    predictor = Predictor(bundle, device="cuda")
    assert on_device(predictor.session.get_providers())
    names = [predictor.manifest.output_names.get(f, f) for f in predictor.fields]
    for seed, n in enumerate([1, 33, 256, 4]):
        x = rows(task, n, seed)[0]
        found = predictor.run({"x": x})
        assert_same(list(found.values()), predictor.session.run(names, {"x": x}))
