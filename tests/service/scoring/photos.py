"""Bundles of networks that look at photos, and photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from posthoc.runtime import open_session

SIZE = (6, 8)  # height, width
CLASSES = ("cat", "dog", "owl")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def pixels(n: int, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """N×H×W×3 bytes: a colour, and noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 100, (n, *size, 3))
    return (noise + rng.integers(0, 156, (n, 1, 1, 3))).astype(np.uint8)


def scaled(images: np.ndarray) -> np.ndarray:
    """Bytes N×H×W×3 as the float networks were trained: N×3×H×W float32."""
    x = images.astype(np.float32) / np.float32(255)
    x = (x - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def classifier(path: Path, *, raw: bool = False) -> Path:
    """Three classes of photos: N×3×6×8 floats, or with ``raw`` N×6×8×3 bytes."""
    size = [*SIZE, 3] if raw else [3, *SIZE]
    kind = TensorProto.UINT8 if raw else TensorProto.FLOAT
    nodes = [helper.make_node("Conv", ["s", "w1"], ["h0"], strides=[2, 2])]
    if raw:
        nodes = [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "k"], ["m"]),
            helper.make_node("Transpose", ["m"], ["s"], perm=[0, 3, 1, 2]),
            *nodes,
        ]
    else:
        nodes[0].input[0] = "x"
    nodes += [
        helper.make_node("Tanh", ["h0"], ["h1"]),
        helper.make_node("GlobalAveragePool", ["h1"], ["h2"]),
        helper.make_node("Flatten", ["h2"], ["h3"]),
        helper.make_node("MatMul", ["h3", "w2"], ["y"], name="head"),
    ]
    return _fit(path, nodes, kind, ["N", *size], ["N", 3], raw)


def restorer(path: Path) -> Path:
    """A map of one number for each pixel, of photos of any size."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["h0"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["h0"], ["h1"]),
        helper.make_node("Conv", ["h1", "w3"], ["y"], name="head"),
    ]
    return _fit(path, nodes, TensorProto.FLOAT, ["N", 3, "H", "W"], ["N", 1, "H", "W"], False)


def _fit(
    path: Path,
    nodes: list[onnx.NodeProto],
    kind: int,
    takes: list[int | str],
    gives: list[int | str],
    raw: bool,
) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(size=(6, 3, 3, 3)) / 2,
        "w2": rng.normal(size=(6, 3)) * 3,
        "w3": rng.normal(size=(1, 6, 1, 1)),
        "k": np.array(1 / 255),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "frozen",
        [helper.make_tensor_value_info("x", kind, takes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, gives)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items() if k in used],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    model = path.parent / f"{path.name}.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model
    )
    x = pixels(600, 2) if raw else scaled(pixels(600, 2))
    (z,) = open_session(model).run(None, {"x": x})
    dense = z.ndim == 4
    noisy = z + rng.normal(size=z.shape) * 0.3 if dense else z / 2 + rng.gumbel(size=z.shape)
    y = noisy.astype(np.float32) if dense else noisy.argmax(1)
    table = path.parent / f"{path.name}.npz"
    np.savez(table, x=x, y=y)
    options = FitOptions(task="regression" if dense else "classification")
    columns = Columns(target="y", classes=None if dense else CLASSES)
    fit(model, table, path, options, name=path.name, columns=columns, cache_dir=path.parent / "c")
    return path


def write_photos(folder: Path, images: np.ndarray, first: int = 0) -> list[str]:
    """One PNG for each image; their names in order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"photo {k:03d}.png" for k in range(first, first + len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    return names
