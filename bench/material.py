"""Real frozen models with cached rows, shared by the benchmarks and the acceptance tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.assets import cache_folder, cached, fashion_mnist, mnist, mnist_input, mnistnet
from calibration.fit import Columns, Material, prepare
from calibration.fit_head import FitOptions
from hedged.demo.corpus import build_corpus, magika_labels, magika_model
from posthoc.contract import Features
from posthoc.data import TableMapping, open_table
from posthoc.export import export_torch
from posthoc.features import build_cache
from posthoc.logits import to_logits


@dataclass(frozen=True)
class Known:
    """A frozen model, its cached labelled rows, and strange rows; ``model`` is an ONNX file."""

    model: Path
    data: Path
    strange: Path
    material: Material
    outside: Features


def magika() -> Known:
    """The demo's model and corpus."""

    def make(folder: Path) -> None:
        build_corpus(folder)

    folder = cached("magika-corpus", make)
    columns = Columns(target="label", inputs={"bytes": ["bytes"]}, classes=magika_labels())
    return _known(magika_model(), folder / "train.parquet", folder / "ood.parquet", columns)


def mnist_net() -> Known:
    """MNISTNet exported from torch on MNIST's 10,000 test images, Fashion-MNIST as strange."""

    def make(folder: Path) -> None:
        images, labels = mnist()
        strange, _ = fashion_mnist()
        x = mnist_input(images)
        exported = export_torch(mnistnet(), (x[:4],), input_names=["image"], rows=(x[:256],))
        (folder / "mnistnet.onnx").write_bytes(exported.model)
        _write(folder / "mnist.parquet", x, labels)
        _write(folder / "fashion.parquet", mnist_input(strange), None)

    folder = cached("mnistnet", make)
    columns = Columns(target="label", inputs={"image": ["image"]})
    return _known(
        folder / "mnistnet.onnx", folder / "mnist.parquet", folder / "fashion.parquet", columns
    )


def _write(path: Path, x: np.ndarray, labels: np.ndarray | None) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), x.shape[1:])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), int(np.prod(x.shape[1:])))
    columns = {"image": pa.ExtensionArray.from_storage(kind, flat)}
    if labels is not None:
        columns["label"] = pa.array(labels.astype(np.int64))
    pq.write_table(pa.table(columns), path)


def _known(model: Path, data: Path, strange: Path, columns: Columns) -> Known:
    cache = cache_folder() / "features"
    options = FitOptions(task="classification")
    material = prepare(model, data, options=options, columns=columns, cache_dir=cache)
    name = material.frozen.inputs[0].name
    rows = build_cache(
        material.frozen,
        open_table(strange),
        TableMapping(inputs={name: (name,)}),
        task="classification",
        cache_dir=cache,
    ).take(np.arange(open_table(strange).n_rows))
    outside = Features(rows.phi, to_logits(rows.z, material.link))
    return Known(model, data, strange, material, outside)
