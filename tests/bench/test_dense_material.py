"""Dense sets as a whole: a real one, and figures against their definitions."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from sklearn.metrics import jaccard_score
from torchmetrics.functional.image import peak_signal_noise_ratio

from bench import dense_material as material
from bench import dense_sets as sets
from posthoc.contract import HedgedError
from posthoc.runtime import open_session
from posthoc.tables import open_table


def test_an_unknown_name() -> None:
    with pytest.raises(HedgedError, match="no dense set is called 'depth'; there are super-res"):
        material.load("depth")


@pytest.mark.long
def test_super_resolution() -> None:
    made = material.load("super-resolution")
    assert (made.task, made.images, made.photos) == ("regression", 2532, 218)
    assert made.table.stat().st_size < 100e6
    for path in (made.table, made.parquet):
        table = open_table(path)
        assert table.n_rows == 2532
        assert table.columns == ("image", made.target, made.group)
    (batch, *_) = open_table(made.parquet).batches(4)
    x = batch.column("image").to_numpy_ndarray().astype(np.float32)
    module, name = made.factory.split(":")
    net = getattr(importlib.import_module(module), name)()
    want = net(torch.from_numpy(x)).numpy()
    assert want.shape == batch.column("target").to_numpy_ndarray().shape
    for model in (made.model, made.any_size):
        got = open_session(model).run(None, {"image": x})[0]
        assert np.abs(got - want).max() < 0.01
    wide = open_session(made.any_size).run(None, {"image": x[:1, :, :20, :]})[0]
    assert wide.shape == (1, 3, 40, 64)


_SHIFT = """
<ir_version: 10, opset_import: ["" : 20]>
shift (float[N, 3, 8, 8] image) => (float[N, 3, 8, 8] z) {
    three = Constant <value = float[1] {3.0}> ()
    z = Add(image, three)
}
"""


def _made(folder: Path, columns: sets.Columns) -> material.DenseSet:
    sets.write(columns, folder)
    onnx.save(onnx.parser.parse_model(_SHIFT), folder / "model.onnx")
    return material.DenseSet(
        "made",
        "regression",
        folder / "model.onnx",
        folder / "any-size.onnx",
        1,
        "",
        folder / "data.npz",
        folder / "data.parquet",
        len(columns["image"]),
        1,
        {"image": ("image",)},
    )


def test_quality_against_libraries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (70, 3, 8, 8), np.uint8)
    y = rng.integers(0, 256, (70, 3, 8, 8), np.uint8)
    y[5] = (x[5].astype(int) + 3).clip(0, 255)  # perfect, so 60 dB
    folders = [tmp_path / "regression", tmp_path / "classes"]
    for folder in folders:
        folder.mkdir()
    photo = np.array(["p"] * 70)
    made = _made(folders[0], {"image": x, "target": y, "photo": photo})
    z = (x.astype(np.float32) + 3).clip(0, 255)
    each = [
        float(peak_signal_noise_ratio(torch.tensor(a), torch.tensor(b).float(), data_range=255.0))
        for a, b in zip(z, y, strict=True)
    ]
    assert np.isinf(each[5])
    each[5] = 60.0
    assert material.quality(made)["psnr"] == pytest.approx(np.mean(each), abs=1e-4)

    classes = rng.integers(0, 4, (70, 8, 8), np.uint8)
    made = _made(folders[1], {"image": x, "target": classes, "photo": photo})
    found = material.quality(replace(made, task="classification"))
    label = x.argmax(1)  # the fourth class is never said
    assert found["accuracy"] == pytest.approx((label == classes).mean())
    want = jaccard_score(classes.ravel(), label.ravel(), average="macro")
    assert found["iou"] == pytest.approx(want)
