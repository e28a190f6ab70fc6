"""Small dense bundles for tests: a frozen convolutional network in ONNX whose labels are drawn from
itself, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from posthoc.contract import Task
from posthoc.runtime import open_session

SIZE = 8
CLASSES = ("sky", "road", "tree")
HIDDEN = 6


def frozen_model(path: Path, task: Task, *, free: bool = False) -> Path:
    """Write the network: N×2×H×W → 3×3 convolution and tanh → 1×1 convolution to 3 logits or a
    mean. H and W are SIZE, or any with ``free``."""
    rng = np.random.default_rng(0)
    out = len(CLASSES) if task == "classification" else 1
    tensors = {
        "w1": rng.normal(size=(HIDDEN, 2, 3, 3)).astype(np.float32) / 2,
        "w2": rng.normal(size=(out, HIDDEN, 1, 1)).astype(np.float32) * 2,
        "b2": rng.normal(size=out).astype(np.float32) / 4,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["h0"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["h0"], ["h1"]),
        helper.make_node("Conv", ["h1", "w2", "b2"], ["y"], name="head"),
    ]
    size = ["H", "W"] if free else [SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "frozen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", out, *size])],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests"
    )
    onnx.save(model, path)
    return path


def images(n: int, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """N×2×H×W float32."""
    return np.random.default_rng(seed).normal(size=(n, 2, *size)).astype(np.float32)


def dense_bundle(path: Path, name: str, task: Task, *, free: bool = False) -> Path:
    """Fit a dense bundle at ``path`` (a second): input ``x``, classes sky, road and tree, or one
    output."""
    scratch = path.parent.parent.parent / f"{name}.fit"
    scratch.mkdir(parents=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = frozen_model(scratch / "model.onnx", task, free=free)
    rng = np.random.default_rng(1)
    x = images(400, 2)
    (z,) = open_session(model).run(None, {"x": x})
    target = (
        (z / 2 + rng.gumbel(size=z.shape)).argmax(1)
        if task == "classification"
        else (z + rng.normal(size=z.shape) * 0.3).astype(np.float32)
    )
    table = scratch / "data.npz"
    np.savez(table, x=x, y=target)
    fit(
        model,
        table,
        path,
        FitOptions(task=task, alphas=(0.2, 0.1), max_error=0.4),
        name=name,
        columns=Columns(target="y", classes=CLASSES if task == "classification" else None),
        cache_dir=scratch / "cache",
        pixels=16,
    )
    return path
