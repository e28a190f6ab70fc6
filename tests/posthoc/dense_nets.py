"""Small networks of maps in ONNX, whatever their layout and ending, and a slow loop beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, shape_inference

F64 = np.ndarray[Any, np.dtype[np.float64]]
node = helper.make_node
CHANNELS, WIDTH = 2, 5  # of the input and of the features


def weights(classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A 3×3 convolution to 5 features (``w1``), a layer of ``classes`` outputs for each pixel as a
    convolution (``w2``) and as a matrix (``m2``)."""
    rng = np.random.default_rng(seed)
    w2 = rng.normal(size=(classes, WIDTH)).astype(np.float32)
    return {
        "w1": (rng.normal(size=(WIDTH, CHANNELS, 3, 3)) / 3).astype(np.float32),
        "b1": rng.normal(size=WIDTH).astype(np.float32),
        "w2": w2[:, :, None, None],
        "m2": np.ascontiguousarray(w2.T),
        "b2": rng.normal(size=classes).astype(np.float32),
    }


def images(n: int, height: int, width: int, seed: int = 1) -> np.ndarray:
    """Standard normal images N×2×H×W."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, CHANNELS, height, width)).astype(np.float32)


def looped(x: np.ndarray, classes: int, seed: int = 0) -> tuple[F64, F64]:
    """Features N×H×W×5 and outputs N×H×W×C, one pixel at a time, in float64."""
    given = {k: v.astype(np.float64) for k, v in weights(classes, seed).items()}
    n, _, height, width = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    phi = np.zeros((n, height, width, WIDTH))
    for i in range(height):
        for j in range(width):
            patch = padded[:, :, i : i + 3, j : j + 3].reshape(n, -1)
            phi[:, i, j] = np.tanh(patch @ given["w1"].reshape(WIDTH, -1).T + given["b1"])
    return phi, phi @ given["m2"] + given["b2"]


BODY = [
    node("Conv", ["x", "w1", "b1"], ["h"], pads=[1, 1, 1, 1]),
    node("Tanh", ["h"], ["phi"]),
]
CONV = [node("Conv", ["phi", "w2", "b2"], ["z"], name="head")]
# Channels last, as converters of other frameworks leave them: the image is N×H×W×2.
LAST_BODY = [
    node("Transpose", ["x"], ["x1"], perm=[0, 3, 1, 2]),
    node("Conv", ["x1", "w1", "b1"], ["h"], pads=[1, 1, 1, 1]),
    node("Tanh", ["h"], ["phi"]),
]


def dense_model(
    nodes: Sequence[Any],
    *,
    classes: int,
    size: Sequence[int | str] = ("H", "W"),
    last: bool = False,
    outputs: Sequence[str] = ("y",),
    types: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
    seed: int = 0,
) -> bytes:
    """The bytes of a model of images N×2×H×W (``last``: N×H×W×2) with ``nodes``."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    given = {k: v.astype(kind) for k, v in weights(classes, seed).items()}
    constants = {**given, **{k: np.asarray(v) for k, v in (extra or {}).items()}}
    used = {name for n in nodes for name in n.input}
    shape = ["N", *size, CHANNELS] if last else ["N", CHANNELS, *size]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [
            helper.make_tensor_value_info(o, (types or {}).get(o, dtype), (shapes or {}).get(o))
            for o in outputs
        ],
        [numpy_helper.from_array(v, k) for k, v in constants.items() if k in used],
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="tests"
    )
    # An output must have a shape; what the operators make of the input's is the honest one.
    return bytes(shape_inference.infer_shapes(made, data_prop=True).SerializeToString())
