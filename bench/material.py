"""Real frozen models with cached rows, shared by the benchmarks and the acceptance tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bench.assets import (
    cache_folder,
    cached,
    fashion_mnist,
    mnist,
    mnist_input,
    mnistnet,
    usps_input,
    uspsnet,
)
from calibration.fit_options import FitOptions
from calibration.material import Columns, Material, prepare
from hedged.demo.corpus import build_corpus, magika_labels, magika_model
from posthoc.contract import Features, Task
from posthoc.data import TableMapping, open_table
from posthoc.export import export_torch
from posthoc.features import build_cache
from posthoc.logits import to_logits

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Files:
    """A frozen model (ONNX) and its tables: labelled rows that it never saw, rows out of
    distribution (or None), and the rows that it was trained on where that was done here."""

    model: Path
    data: Path
    strange: Path | None = None
    train: Path | None = None


@dataclass(frozen=True)
class Known:
    """A frozen model, its cached labelled rows, and strange rows; ``model`` is an ONNX file.

    ``strange`` and ``outside`` (its features and logits) are None where no such rows are known,
    ``train`` where somebody else trained the model.
    """

    model: Path
    data: Path
    strange: Path | None
    material: Material
    outside: Features | None
    train: Path | None = None


def magika() -> Known:
    """The demo's model and corpus."""
    return open_known(magika_files(), "classification", magika_columns())


def mnist_net() -> Known:
    """MNISTNet exported from torch on MNIST's 10,000 test images, Fashion-MNIST as strange."""
    return open_known(mnist_files(), "classification", Columns(target="label"))


def magika_columns() -> Columns:
    """What is what in the corpus, the 214 names in the order of the outputs."""
    return Columns(target="label", inputs={"bytes": ["bytes"]}, classes=magika_labels())


def magika_files() -> Files:
    """The installed model, and the corpus in the cache."""

    def make(folder: Path) -> None:
        build_corpus(folder)

    folder = cached("magika-corpus", make)
    return Files(magika_model(), folder / "train.parquet", folder / "ood.parquet")


def mnist_files() -> Files:
    """MNISTNet exported from torch, the 10,000 test images, Fashion-MNIST's as strange."""
    return _digits("mnistnet-1", mnistnet, mnist_input)


def usps_files() -> Files:
    """USPSNet, a reader of envelopes, deployed on MNIST's test images: a natural shift.
    Fashion-MNIST's as strange."""
    return _digits("uspsnet-1", uspsnet, usps_input)


def open_known(files: Files, task: Task, columns: Columns) -> Known:
    """The model opened and run once over both tables; its features stay in the asset cache."""
    cache = cache_folder() / "features"
    material = prepare(
        files.model, files.data, options=FitOptions(task=task), columns=columns, cache_dir=cache
    )
    outside = None
    if files.strange is not None:
        strange = open_table(files.strange)
        rows = build_cache(
            material.frozen,
            strange,
            TableMapping(inputs=material.mapping.inputs),
            task=task,
            cache_dir=cache,
        ).take(np.arange(strange.n_rows))
        outside = Features(rows.phi, to_logits(rows.z, material.link))
    return Known(files.model, files.data, files.strange, material, outside, files.train)


def _digits(
    name: str,
    model: Callable[[], nn.Module],
    inputs: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> Files:
    def make(folder: Path) -> None:
        images, labels = mnist()
        strange, _ = fashion_mnist()
        x = inputs(images)
        exported = export_torch(model(), (x[:4],), input_names=["image"], rows=(x[:256],))
        (folder / "model.onnx").write_bytes(exported.model)
        _write(folder / "mnist.parquet", x, labels)
        _write(folder / "fashion.parquet", inputs(strange), None)

    folder = cached(name, make)
    return Files(folder / "model.onnx", folder / "mnist.parquet", folder / "fashion.parquet")


def _write(path: Path, x: NDArray[np.float32], labels: NDArray[np.int64] | None) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), x.shape[1:])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), int(np.prod(x.shape[1:])))
    columns = {"image": pa.ExtensionArray.from_storage(kind, flat)}
    if labels is not None:
        columns["label"] = pa.array(labels.astype(np.int64))
    pq.write_table(pa.table(columns), path)
