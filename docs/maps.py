"""A segmentation model to practise on: ``python docs/maps.py`` writes it, and images for it, here.

Scans of 32×32 pixels show discs and boxes of two brightnesses on a dark ground. The model blurs a
scan and asks of every pixel which brightness is nearest; nothing in it was trained. It takes the
noise for smaller than it is, so it is far surer of itself than it should be, above all at edges.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper

SIDE = 32
BRIGHT = np.array([0.0, 0.5, 1.0])  # ground, disc, box
SPREAD = 0.05  # of a brightness about these, as the model believes
CLASSES = ("ground", "disc", "box")


def scans(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images N×1×32×32 (float32) and classes N×32×32; some scans are noisier than others."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    masks = np.zeros((n, SIDE, SIDE), np.int64)
    for mask in masks:
        for kind in (1, 2):
            cy, cx, r = *rng.uniform(4, SIDE - 4, 2), rng.uniform(3, 8)
            disc = (y - cy) ** 2 + (x - cx) ** 2 < r * r
            box = np.maximum(abs(y - cy), abs(x - cx)) < r
            mask[disc if kind == 1 else box] = kind
    noise = rng.uniform(0.1, 0.5, (n, 1, 1)) * rng.normal(size=masks.shape)
    return (BRIGHT[masks] + noise).astype(np.float32)[:, None], masks


def model() -> onnx.ModelProto:
    """Blur, [b, b²], and a 1×1 convolution: logits -(b - brightness)² / (2 spread²)."""
    line = np.exp(-0.5 * (np.arange(5) - 2.0) ** 2)
    blur = np.outer(line, line) / line.sum() ** 2
    head = np.stack([BRIGHT, np.full(3, -0.5)], 1) / SPREAD**2
    weights = {
        "blur": blur[None, None],
        "head.weight": head[:, :, None, None],
        "head.bias": -0.5 * BRIGHT**2 / SPREAD**2,
    }
    nodes = [
        helper.make_node("Conv", ["scan", "blur"], ["b"], pads=[2, 2, 2, 2]),
        helper.make_node("Mul", ["b", "b"], ["square"]),
        helper.make_node("Concat", ["b", "square"], ["features"], axis=1),
        helper.make_node("Conv", ["features", "head.weight", "head.bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["classes"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "segment",
        [helper.make_tensor_value_info("scan", TensorProto.FLOAT, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("classes", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def tensors(values: np.ndarray) -> pa.ExtensionArray:
    """An array with an axis of rows as a column of tensors."""
    # A copy: pyarrow misreads the strides of an axis that was only put in.
    return pa.FixedShapeTensorArray.from_numpy_ndarray(values.copy())


def main() -> None:
    """Write segment.onnx, segment.txt, scans.parquet and fresh-scans.parquet."""
    onnx.save(model(), "segment.onnx")
    Path("segment.txt").write_text("\n".join(CLASSES) + "\n")
    for name, n, seed in (("scans", 600, 0), ("fresh-scans", 200, 1)):
        columns = dict(zip(("scan", "mask"), map(tensors, scans(n, seed)), strict=True))
        pq.write_table(pa.table(columns), f"{name}.parquet")


if __name__ == "__main__":
    main()
