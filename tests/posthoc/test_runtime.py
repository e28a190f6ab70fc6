"""Provider choice as a function of what is there, and sessions on the real runtime."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import posthoc.runtime
from posthoc.contract import ModelError, TensorSpec
from posthoc.runtime import (
    CPU,
    CUDA,
    TENSORRT,
    choose_providers,
    core_count,
    cuda_device_count,
    open_session,
    planned_provider,
    provider_name,
    session_specs,
    usable_providers,
)

ALL = [TENSORRT, CUDA, CPU]


def identity(dtype: int = TensorProto.FLOAT) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["N", 3, None])],
        [helper.make_tensor_value_info("y", dtype, ["N", 3, None])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()


def names(providers):
    return [p if isinstance(p, str) else p[0] for p in providers]


@pytest.mark.parametrize(
    ("device", "available", "want"),
    [
        ("cpu", ALL, [CPU]),
        ("auto", ALL, [CUDA, CPU]),
        ("auto", [CPU], [CPU]),
        ("cuda", ALL, [CUDA, CPU]),
        ("cuda:3", [CUDA, CPU], [CUDA, CPU]),
        ("tensorrt", ALL, [TENSORRT, CUDA, CPU]),
        ("tensorrt", [TENSORRT, CPU], [TENSORRT, CPU]),
    ],
)
def test_providers_in_order_of_preference(device, available, want):
    assert names(choose_providers(device, available)) == want


def test_the_cuda_index_reaches_the_provider():
    [(_, options), _] = choose_providers("cuda:3", ALL)
    assert options["device_id"] == 3
    [(_, options), _] = choose_providers("cuda", ALL)
    assert options["device_id"] == 0


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1"])
def test_an_unknown_device_is_refused_by_name(device):
    with pytest.raises(ModelError, match=f"device {device!r} is unknown"):
        choose_providers(device, ALL)


@pytest.mark.parametrize(("device", "provider"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_provider_that_is_not_built_in_is_refused_by_name(device, provider):
    with pytest.raises(ModelError, match=f"needs {provider}"):
        choose_providers(device, [CPU])


def test_a_cpu_session_runs_what_it_is_given(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    path = tmp_path / "identity.onnx"
    path.write_bytes(identity())
    for model in (identity(), path, str(path)):
        session = open_session(model, device="cpu", threads=1)
        assert provider_name(session) == CPU
        assert session.get_providers() == [CPU]
        assert session.get_session_options().intra_op_num_threads == 1
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)


def test_a_large_graph_from_bytes_is_the_graph_and_leaves_no_file():
    w = np.random.default_rng(0).normal(size=(1100, 1100)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1100])],
        [numpy_helper.from_array(w, "w")],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    assert len(model) > posthoc.runtime._LARGE
    before = open_files()
    session = open_session(model, threads=1)
    x = np.random.default_rng(1).normal(size=(3, 1100)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ w, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="cannot load the model") as refused:
        open_session(b"\xff" * len(model))
    assert "/proc" not in str(refused.value)
    assert open_files() == before


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_auto_takes_a_device_only_where_one_is_visible():
    usable = usable_providers()
    assert CPU in usable
    assert (CUDA in usable) == (cuda_device_count() > 0 and CUDA in ort.get_available_providers())
    session = open_session(identity(), device="auto")
    assert provider_name(session) == planned_provider("auto")


@pytest.mark.parametrize("device", ["cuda:99", "tensorrt"])
def test_a_named_device_that_does_not_start_is_an_error_not_a_fallback(device):
    """CUDA is listed wherever it is compiled in; device 99 exists on no machine."""
    if device == "tensorrt" and cuda_device_count():
        device = "cuda:98"
    with pytest.raises(ModelError, match=device):
        open_session(identity(), device=device)


def test_specs_use_numpy_names_and_minus_one():
    for onnx_type, name in (
        (TensorProto.FLOAT, "float32"),
        (TensorProto.DOUBLE, "float64"),
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.INT8, "int8"),
        (TensorProto.UINT8, "uint8"),
        (TensorProto.INT64, "int64"),
        (TensorProto.BOOL, "bool"),
    ):
        inputs, outputs = session_specs(open_session(identity(onnx_type)))
        assert inputs == (TensorSpec(name="x", dtype=name, shape=(-1, 3, -1)),)
        assert outputs == (TensorSpec(name="y", dtype=name, shape=(-1, 3, -1)),)
        assert np.dtype(name).name == name


def test_a_zipmap_says_how_to_export_without_it():
    graph = helper.make_graph(
        [helper.make_node("ZipMap", ["p"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])],
        "g",
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 2])],
        [
            helper.make_value_info(
                "m",
                helper.make_sequence_type_proto(
                    helper.make_map_type_proto(
                        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
                    )
                ),
            )
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(ModelError, match="zipmap=False"):
        session_specs(open_session(model.SerializeToString()))


@pytest.mark.parametrize("model", [b"", b"not a model", "missing.onnx"])
def test_what_is_not_a_model_is_an_error_of_ours(model):
    with pytest.raises(ModelError, match="cannot load"):
        open_session(model)


def test_a_confined_process_counts_the_cores_that_it_may_use():
    all_of_them = os.sched_getaffinity(0)
    assert core_count() == len(all_of_them)
    try:
        os.sched_setaffinity(0, {min(all_of_them)})
        assert core_count() == 1
    finally:
        os.sched_setaffinity(0, all_of_them)
