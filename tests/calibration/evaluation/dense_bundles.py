"""Bundles of two tiny dense networks whose weights are written down, and scenes for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.bundle import Bundle
from calibration.evaluate import evaluate
from calibration.evaluation import Evaluation
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns

HIGH, WIDE = 10, 12
LEVELS = (0.0, 0.5, 1.0)  # brightness of the three classes
SPREAD = 0.3


def scenes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images 1×10×12 of a disc and a box in noise whose strength differs, and their classes."""
    rng = np.random.default_rng(seed)
    y = np.zeros((n, HIGH, WIDE), np.int64)
    at = np.mgrid[:HIGH, :WIDE]
    for i in range(n):
        for c in (1, 2):
            cy, cx, r = rng.uniform(2, HIGH - 2), rng.uniform(2, WIDE - 2), rng.uniform(1.5, 3)
            gone = np.stack([at[0] - cy, at[1] - cx])
            y[i][(gone**2).sum(0) < r * r if c == 1 else np.abs(gone).max(0) < r] = c
    noise = rng.normal(0, 1, y.shape) * rng.uniform(0.1, 0.7, (n, 1, 1))
    return (0.5 * y + noise)[:, None].astype(np.float32), y


def network(path: Path, task: str, *, outputs: int = 3, last: bool = False) -> Path:
    """A blur and three odd filters, ReLU, and a 1×1 convolution: log odds of the classes, or the
    brightness in each of ``outputs`` channels; ``last``: an output N×H×W×C."""
    rng = np.random.default_rng(0)
    filters = 0.3 * rng.normal(size=(4, 1, 3, 3))
    filters[0] = 1 / 9
    if task == "classification":
        weight = np.zeros((3, 4))
        weight[:, 0] = np.array(LEVELS) / SPREAD**2
        bias = -(np.array(LEVELS) ** 2) / 2 / SPREAD**2 - weight[:, 0]  # the blur is shifted by 1
    else:
        weight = np.zeros((outputs, 4))
        weight[:, 0] = 1 + 0.1 * np.arange(outputs)
        bias = -weight[:, 0]
    weight[:, 1:] = 0.02 * rng.normal(size=(len(weight), 3))
    tensors = {
        "w1": filters,
        "b1": np.array([1.0, 0.0, 0.0, 0.0]),
        "w2": weight[:, :, None, None],
        "b2": bias,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["h0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h0"], ["h"]),
        helper.make_node("Conv", ["h", "w2", "b2"], ["o" if last else "z"]),
    ]
    shape: list[Any] = ["N", len(weight), HIGH, WIDE]
    if last:
        nodes.append(helper.make_node("Transpose", ["o"], ["z"], perm=[0, 2, 3, 1]))
        shape = ["N", HIGH, WIDE, len(weight)]
    graph = helper.make_graph(
        nodes,
        "frozen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, HIGH, WIDE])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def targets(y: np.ndarray, outputs: int) -> np.ndarray:
    """Brightness N×K×H×W of class maps, with a hole in the corner of every third image."""
    values = 0.5 * y[:, None] * (1 + 0.1 * np.arange(outputs)[:, None, None])
    values[::3, :, :2, :2] = np.nan
    return values.astype(np.float32)


def segmented(folder: Path, *, n: int = 400, last: bool = False, **options: Any) -> Bundle:
    """A segmentation bundle and ``data.npz`` beside it; two rows of every image have no label."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = scenes(n, 1)
    y[:, :2] = -1
    np.savez(folder / "data.npz", x=x, y=y)
    model = network(folder / "model.onnx", "classification", last=last)
    return _fit(model, folder, FitOptions(task="classification", **_options(options)))


def restored(folder: Path, *, n: int = 400, outputs: int = 3, **options: Any) -> Bundle:
    """An image regression bundle and ``data.npz`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = scenes(n, 1)
    np.savez(folder / "data.npz", x=x, y=targets(y, outputs))
    model = network(folder / "model.onnx", "regression", outputs=outputs)
    return _fit(model, folder, FitOptions(task="regression", **_options(options)))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    alphas: Sequence[float] = (0.1, 0.2)
    return {"method": "laplace", "alphas": alphas, **given}


def _fit(model: Path, folder: Path, options: FitOptions) -> Bundle:
    return fit(
        model,
        folder / "data.npz",
        folder / "bundle",
        options,
        columns=Columns(target="y"),
        cache_dir=folder / "cache",
        pixels=24,
    )


def evaluation(task: str, folder: Path) -> Evaluation:
    """Of a bundle on its own test images, with strange ones of noise."""
    bundle = (segmented if task == "classification" else restored)(folder, n=200)
    x = np.random.default_rng(3).normal(0, 3, (15, 1, HIGH, WIDE)).astype(np.float32)
    np.savez(folder / "strange.npz", x=x)
    return evaluate(bundle, folder / "data.npz", ood_data={"noise": folder / "strange.npz"})
