"""What open_frozen takes and refuses: inputs, opsets, external data; and magika."""

import dataclasses
import hashlib
from importlib.metadata import files
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy.special import softmax

from posthoc.contract import ModelError
from posthoc.frozen import expose, open_frozen
from tests.posthoc.networks import (
    AXES,
    BODY,
    HEAD,
    LOGITS,
    PHI,
    WEIGHTS,
    C,
    D,
    K,
    X,
    check_exposed,
    model,
    node,
    run,
)

# ---- inputs


def test_several_inputs_free_axes_and_a_mask():
    """Mean of a sequence of embeddings under a mask; free length, integer and bool inputs."""
    rng = np.random.default_rng(3)
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Cast", ["mask"], ["m0"], to=1),
        node("Unsqueeze", ["m0", "last"], ["m1"]),
        node("Mul", ["rows", "m1"], ["masked"]),
        node("ReduceSum", ["masked", "one"], ["phi"], keepdims=0),
        *HEAD,
        node("Softmax", ["z"], ["y"]),
    ]
    data = model(
        nodes,
        extra={"table": rng.normal(size=(11, C)).astype("f4"), "one": np.array([1]), **AXES},
        inputs=[("ids", TensorProto.INT64, ["N", "T"]), ("mask", TensorProto.BOOL, ["N", "T"])],
    )
    f = open_frozen(data, task="classification")
    assert [(s.dtype, s.shape) for s in f.inputs] == [("int64", (-1, -1)), ("bool", (-1, -1))]
    assert (f.phi, f.head_node) == ("phi", "head")


def test_rows_that_random_ones_cannot_stand_for_are_given():
    nodes = [
        node("Gather", ["table", "ids"], ["phi"]),
        *HEAD,
        node("Softmax", ["z"], ["y"]),
    ]
    data = model(nodes, extra={"table": np.ones((1, C), np.float32)}, inputs=[("ids", 7, ["N"])])
    with pytest.raises(ModelError, match="does not run on a batch of 8 random rows"):
        open_frozen(data, task="classification")
    f = open_frozen(data, task="classification", sample={"ids": np.zeros(3, np.int64)})
    assert f.head_node == "head"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_exposed_as_float32(dtype):
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    data = model(
        [*BODY, *HEAD, node("Softmax", ["z"], ["y"])],
        extra={k: v.astype(dtype) for k, v in WEIGHTS.items()},
        inputs=[("x", code, ["N", D])],
        types={"y": code},
    )
    f = open_frozen(data, task="classification")
    x = {"x": X.astype(dtype)}
    phi, z = run(expose(f), [f.phi, f.z], x)
    assert phi.dtype == z.dtype == np.float32
    np.testing.assert_allclose(z, LOGITS, atol=0.05 if dtype == np.float16 else 1e-5)
    assert f.size == len(data) and f.sha256 == hashlib.sha256(data).hexdigest()


REFUSED = {
    "a fixed batch": (
        {"nodes": [*BODY, *HEAD], "inputs": [("x", 1, [1, D])], "outputs": ["z"]},
        "input 'x' has 1 rows in its first axis; export the model with a dynamic batch",
    ),
    "a scalar input": (
        {
            "nodes": [*BODY, *HEAD, node("Mul", ["z", "k"], ["y"])],
            "inputs": [("x", 1, ["N", D]), ("k", 1, [])],
        },
        "input 'k' has no rows",
    ),
    "text": (
        {
            "nodes": [node("StringNormalizer", ["x"], ["y"])],
            "inputs": [("x", TensorProto.STRING, ["N"])],
            "types": {"y": TensorProto.STRING},
            "shapes": {"y": ["N"]},
        },
        "input 'x' takes text",
    ),
    "rows that meet": (
        {
            "nodes": [
                node("ReduceMean", ["x"], ["c"], axes=[0]),
                node("Sub", ["x", "c"], ["xc"]),
                node("MatMul", ["xc", "w1"], ["y"]),
            ]
        },
        "changes with the rows beside it",
    ),
    "a random operator": (
        {
            "nodes": [
                *BODY,
                node("RandomNormalLike", ["phi"], ["r"]),
                node("Add", ["phi", "r"], ["y"]),
            ]
        },
        "from run to run",
    ),
    "a hard-wired batch": (
        {
            "nodes": [*BODY, *HEAD, node("Reshape", ["z", "shape"], ["y"])],
            "extra": {"shape": np.array([1, K])},
        },
        "does not run on a batch of 8",
    ),
    "a sum over rows": (
        {
            "nodes": [*BODY, node("ReduceSum", ["phi", "zero"], ["y"])],
            "extra": {"zero": np.array([0])},
            "shapes": {"y": [1, C]},
        },
        "axis 0 must be N",
    ),
    "whole numbers": (
        {"nodes": [*BODY, node("Cast", ["phi"], ["y"], to=7)], "types": {"y": TensorProto.INT64}},
        r"has values int64 of shape \(8, 6\); classification takes one row of floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_row_by_row_is_refused(what):
    kwargs, why = REFUSED[what]
    with pytest.raises(ModelError, match=why):
        open_frozen(model(**kwargs), task="classification")


# ---- files


def test_old_opsets_are_converted_and_unchanged():
    nodes = [*BODY, *HEAD, node("Softmax", ["z"], ["y"], axis=1)]
    for opset in (7, 9, 11, 12):
        data = model(nodes, opset=opset, ir_version=6)
        f = open_frozen(data, task="classification")
        assert f.opset == 17 and f.head_node == "head" and "converted" in f.notes[0]
        assert f.sha256 == hashlib.sha256(data).hexdigest() and f.model != data
        np.testing.assert_allclose(run(f.model)[0], run(data)[0], rtol=1e-6)
        check_exposed(f, PHI, LOGITS)


def test_an_opset_that_cannot_be_converted_names_the_operator():
    body = helper.make_graph(
        [node("Identity", ["a"], ["b"])],
        "body",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [C])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [C])],
    )
    nodes = [
        *BODY,
        node("Unsqueeze", ["phi"], ["one"], axes=[1]),
        node("Scan", ["", "one"], ["two"], num_scan_inputs=1, body=body),
        node("Squeeze", ["two"], ["y"], axes=[1]),
    ]
    with pytest.raises(
        ModelError, match=r"opset 8 cannot be converted to 17 .*operators are .*Scan"
    ):
        open_frozen(model(nodes, opset=8, ir_version=6), task="classification")


def test_a_conversion_that_changes_an_output_is_refused():
    """Hardmax over axis 0 was over all values at once, and is over columns since opset 13."""
    nodes = [*BODY, node("Hardmax", ["phi"], ["y"], axis=0)]
    with pytest.raises(ModelError, match=r"changes output 'y'; .*Hardmax"):
        open_frozen(model(nodes, opset=11, ir_version=6), task="classification")


def test_local_functions_are_opened():
    function = helper.make_function(
        "local",
        "Dense",
        ["p", "w", "b"],
        ["o"],
        [node("MatMul", ["p", "w"], ["mm"]), node("Add", ["mm", "b"], ["o"])],
        [helper.make_opsetid("", 17)],
    )
    data = model(
        [*BODY, node("Dense", ["phi", "w2", "b2"], ["z"], domain="local"),
         node("Softmax", ["z"], ["y"])],
        functions=[function],
        opsets=[helper.make_opsetid("local", 1)],
    )  # fmt: skip
    f = open_frozen(data, task="classification")
    assert f.phi == "phi" and not onnx.load_from_string(f.model).functions
    check_exposed(f, PHI, LOGITS)


def saved_externally(folder: Path) -> Path:
    proto = onnx.load_from_string(model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])]))
    onnx.save(
        proto,
        folder / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return folder / "m.onnx"


def test_external_data_is_read_into_one_file(tmp_path):
    path = saved_externally(tmp_path)
    f = open_frozen(path, task="classification")
    assert f.file == "m.onnx" and f.size == len(f.model)
    assert f.sha256 == hashlib.sha256(f.model).hexdigest()
    (tmp_path / "weights.bin").unlink()
    check_exposed(f, PHI, LOGITS)


@pytest.mark.parametrize(
    "trick", ["parent", "absolute", "link", "folder", "missing", "cut", "bytes"]
)
def test_external_data_comes_only_from_whole_plain_files_beside_the_model(trick, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    path = saved_externally(folder)
    weights = folder / "weights.bin"
    outside = tmp_path / "outside.bin"
    outside.write_bytes(weights.read_bytes())
    proto = onnx.load(path, load_external_data=False)
    places = {"parent": "../outside.bin", "absolute": str(outside)}
    for t in proto.graph.initializer:
        for entry in t.external_data:
            if entry.key == "location":
                entry.value = places.get(trick, "weights.bin")
    path.write_bytes(proto.SerializeToString())
    if trick == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif trick in ("link", "missing", "folder"):
        weights.unlink()
        if trick == "link":
            weights.symlink_to(outside)
        elif trick == "folder":
            weights.mkdir()
    with pytest.raises(ModelError, match=r"weights\.bin|outside\.bin"):
        open_frozen(path.read_bytes() if trick == "bytes" else path, task="classification")


def test_what_is_not_a_model_is_refused_by_name(tmp_path):
    for name, data in (("zero.onnx", b""), ("text.onnx", b"hello world"), ("cut.onnx", None)):
        whole = model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])])
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if data is None else data)
        with pytest.raises(ModelError, match=name):
            open_frozen(tmp_path / name, task="classification")
    with pytest.raises(ModelError, match=r"missing\.onnx: cannot be read"):
        open_frozen(tmp_path / "missing.onnx", task="classification")


def test_frozen_is_a_value():
    f = open_frozen(model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])]), task="classification")
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.z = "other"


# ---- a real model


def test_magika():
    """A deployed classifier: opset 15, decomposed softmax, int32 input, head MatMul + Add."""
    [path] = [f for f in files("magika") if f.match("*/standard_v3_3/model.onnx")]
    f = open_frozen(path.locate(), task="classification")
    assert f.inputs[0].shape == (-1, 2048) and f.inputs[0].dtype == "int32"
    assert f.head.weight.shape == (214, 512) and f.z_dim == 214 and f.opset == 15
    assert f.head_node.endswith("Dense_1/MatMul") and f.tail == ("Softmax",) and f.notes == ()
    rng = np.random.default_rng(0)
    x = {"bytes": rng.integers(0, 257, (8, 2048)).astype(np.int32)}
    want = run(Path(path.locate()).read_bytes(), ["target_label"], x)[0]
    got, phi, z = run(expose(f), ["target_label", f.phi, f.z], x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(softmax(z, 1), want, atol=1e-6)
    np.testing.assert_allclose(phi @ f.head.weight.T + f.head.bias, z, rtol=1e-4, atol=1e-4)
