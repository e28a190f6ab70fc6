"""Frozen networks in ONNX with whatever names, opset and ending a test asks for, and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper

from calibration.fit_options import FitOptions
from calibration.material import Columns, Material, prepare
from posthoc.runtime import open_session

INPUTS = ("a", "b", "c", "d")
HIDDEN = 16


def network(
    path: Path,
    *,
    out: int = 3,
    tail: Sequence[str] = ("Softmax",),
    opset: int = 17,
    batch: str = "N",
    names: Mapping[str, str] | None = None,
) -> Path:
    """Four inputs ``x``, 16 tanh units, ``out`` outputs, then the operators of ``tail`` to ``y``.

    ``names`` renames tensors: x, w1, b1, h0, h1, h2, w2, b2, o0, o1, y.
    """

    def n(key: str) -> str:
        return (names or {}).get(key, key)

    rng = np.random.default_rng(0)
    tensors = {
        "w1": rng.normal(size=(len(INPUTS), HIDDEN)),
        "b1": rng.normal(size=HIDDEN),
        "w2": rng.normal(size=(HIDDEN, out)) * 1.2,
        "b2": rng.normal(size=out) * 0.3,
    }
    body = [
        ("MatMul", ["x", "w1"], "h0"),
        ("Add", ["h0", "b1"], "h1"),
        ("Tanh", ["h1"], "h2"),
        ("MatMul", ["h2", "w2"], "o0"),
        ("Add", ["o0", "b2"], "o1" if tail else "y"),
    ]
    chain = ["o1", *(f"t{i}" for i in range(len(tail) - 1)), "y"]
    body += [(kind, [chain[i]], chain[i + 1]) for i, kind in enumerate(tail)]
    graph = helper.make_graph(
        [helper.make_node(kind, [n(i) for i in ins], [n(made)]) for kind, ins, made in body],
        "frozen",
        [helper.make_tensor_value_info(n("x"), TensorProto.FLOAT, [batch, len(INPUTS)])],
        [helper.make_tensor_value_info(n("y"), TensorProto.FLOAT, [batch, out])],
        [numpy_helper.from_array(v.astype(np.float32), n(k)) for k, v in tensors.items()],
    )
    return _save(path, graph, opset)


def black_box(path: Path) -> Path:
    """Softmax of minus the squared distances to three points: no linear layer anywhere."""
    centres = np.random.default_rng(0).normal(size=(1, 3, len(INPUTS))).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["x", "one"], ["each"]),
            helper.make_node("Sub", ["each", "centres"], ["apart"]),
            helper.make_node("Mul", ["apart", "apart"], ["squared"]),
            helper.make_node("ReduceSum", ["squared", "two"], ["distance"], keepdims=0),
            helper.make_node("Neg", ["distance"], ["z"]),
            helper.make_node("Softmax", ["z"], ["y"]),
        ],
        "frozen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", len(INPUTS)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(centres, "centres"),
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.array([2]), "two"),
        ],
    )
    return _save(path, graph, 17)


def _save(path: Path, graph: onnx.GraphProto, opset: int) -> Path:
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="tests"
    )
    onnx.save(model, path)
    return path


def bare(model: Path, x: np.ndarray) -> np.ndarray:
    """What the frozen model alone says of inputs N×4."""
    session = open_session(model.read_bytes())
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def inputs(n: int, seed: int) -> np.ndarray:
    """Standard normal inputs N×4."""
    return np.random.default_rng(seed).normal(size=(n, len(INPUTS))).astype(np.float32)


def log_probs(model: Path, x: np.ndarray) -> np.ndarray:
    """log p N×C of a frozen model that ends in a softmax, a sigmoid (two classes), or logits."""
    y = bare(model, x).astype(np.float64)
    if y.shape[1] == 1:
        kinds = [node.op_type for node in onnx.load(model).graph.node]
        p = y if kinds[-1] == "Sigmoid" else 1 / (1 + np.exp(-y))
        return np.log(np.concatenate([1 - p, p], 1))
    z = np.log(y) if (y > 0).all() and np.allclose(y.sum(1), 1, atol=1e-4) else y
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def table(
    model: Path, n: int = 2000, seed: int = 1, temperature: float = 2.0, **columns: object
) -> Path:
    """Parquet of inputs and of ``target``, drawn from the model itself at a temperature."""
    x = inputs(n, seed)
    z = log_probs(model, x)
    y = (z / temperature + np.random.default_rng(seed + 1000).gumbel(size=z.shape)).argmax(1)
    path = model.with_name(f"{model.stem}-{n}-{seed}.parquet")
    made = {**{c: x[:, i] for i, c in enumerate(INPUTS)}, "target": y, **columns}
    pq.write_table(pa.table(made), path)
    return path


def columns(model: Path, **more: object) -> Columns:
    """Inputs by the four columns, labels by ``target``."""
    name = onnx.load(model).graph.input[0].name
    return Columns(**{"target": "target", "inputs": {name: INPUTS}, **more})  # type: ignore[arg-type]


def material(model: Path, data: Path) -> Material:
    """The model and its cached rows."""
    options = FitOptions(task="classification")
    return prepare(
        model, data, options=options, columns=columns(model), cache_dir=model.parent / "cache"
    )
