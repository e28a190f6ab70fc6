"""Frozen networks with a map as output, with tables of images that they never saw.

``python -m bench.dense_material [NAME …]`` makes them and prints how good each network is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench import dense_networks as networks
from bench import dense_sets as sets
from bench.assets import cached
from bench.dense_assets import patches
from bench.networks import one_thread
from posthoc.contract import HedgedError, Task
from posthoc.export import export_torch
from posthoc.runtime import open_session
from posthoc.tables import open_table

VERSION = 1  # raise it when a table or an export changes: it names the cache folders
IMAGES = 2400  # composites of the segmentation set
SEED = 1  # of noise and composites; training draws with seed 0
EXAMPLES = 8  # images that an export is compared on
INPUT, TARGET, GROUP = "image", "target", "photo"


@dataclass(frozen=True, slots=True)
class DenseSet:
    """A network and its data.

    ``model`` is ONNX for images of the table's size, ``any_size`` the same with free height and
    width (multiples of ``multiple``); ``factory`` gives it as a frozen torch module. Both tables
    hold the same rows: ``image`` uint8 N×3×H×W, ``target`` (uint8; regression N×3×H'×W', classes
    N×H×W), ``photo`` (text; rows of one photo belong together), and what `bench.dense_sets` adds.
    """

    name: str
    task: Task
    model: Path
    any_size: Path
    multiple: int
    factory: str
    table: Path
    parquet: Path
    images: int
    photos: int
    inputs: dict[str, tuple[str, ...]]
    target: str = TARGET
    group: str = GROUP
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Origin:
    task: Task
    network: Callable[[], nn.Module]
    columns: Callable[[], sets.Columns]
    multiple: int = 1
    classes: tuple[str, ...] | None = None


_ORIGINS = {
    "super-resolution": _Origin(
        "regression", networks.esrgan_slim, lambda: sets.super_resolution(patches())
    ),
    "denoising": _Origin(
        "regression",
        networks.dncnn,
        lambda: sets.denoising(networks.held_out_patches(), SEED),
    ),
    "segmentation": _Origin(
        "classification",
        networks.unet,
        lambda: sets.segmentation(networks.held_out_patches(), IMAGES, SEED),
        multiple=4,
        classes=sets.CLASSES,
    ),
}
NAMES = tuple(_ORIGINS)


def load(name: str) -> DenseSet:
    """The set of that name, made on first use.

    Raises HedgedError for an unknown name, and saying what cannot be fetched.
    """
    if name not in _ORIGINS:
        raise HedgedError(f"no dense set is called {name!r}; there are {', '.join(NAMES)}")
    origin = _ORIGINS[name]

    def make(folder: Path) -> None:
        columns = origin.columns()
        sets.write(columns, folder)
        export(origin.network(), columns[INPUT][:EXAMPLES], folder, origin.multiple)

    folder = cached(f"dense-{name}-{VERSION}", make)
    with np.load(folder / "data.npz") as data:
        photo = data[GROUP]
    return DenseSet(
        name=name,
        task=origin.task,
        model=folder / "model.onnx",
        any_size=folder / "any-size.onnx",
        multiple=origin.multiple,
        factory=f"{networks.__name__}:{origin.network.__name__}",
        table=folder / "data.npz",
        parquet=folder / "data.parquet",
        images=len(photo),
        photos=len(np.unique(photo)),
        inputs={INPUT: (INPUT,)},
        classes=origin.classes,
    )


def export(net: nn.Module, images: NDArray[np.generic], folder: Path, multiple: int = 1) -> None:
    """``model.onnx`` for images of this size, N×3×H×W, and ``any-size.onnx`` for heights and widths
    that are multiples of ``multiple``; the input is called ``image``."""
    x = torch.from_numpy(images.astype(np.float32))
    with one_thread():
        fixed = export_torch(net, (x,), input_names=[INPUT])
        sides = [multiple * torch.export.Dim(side, min=2) for side in ("height", "width")]
        free = {0: torch.export.Dim("batch"), 2: sides[0], 3: sides[1]}
        program = torch.export.export(net, (x,), dynamic_shapes=(free,))
        dynamic = export_torch(program, (x,), input_names=[INPUT])
    (folder / "model.onnx").write_bytes(fixed.model)
    (folder / "any-size.onnx").write_bytes(dynamic.model)


def quality(made: DenseSet) -> dict[str, float]:
    """How good the network is on all images: PSNR in dB (mean over images of at most 60 each; of
    the outputs clipped to 0–255), or accuracy and mean intersection over union of the classes."""
    session = open_session(made.model)
    found, seen, joined = [], np.zeros(len(sets.CLASSES)), np.zeros(len(sets.CLASSES))
    for batch in open_table(made.table).batches(64, [INPUT, TARGET]):
        x, y = (column.to_numpy_ndarray() for column in batch.columns)
        z = session.run(None, {INPUT: x.astype(np.float32)})[0]
        if made.task == "regression":
            found.append(psnr(z.clip(0, 255), y))
        else:
            label = z.argmax(1)
            found.append((label == y).mean((1, 2)))
            for k in range(len(seen)):
                seen[k] += ((label == k) & (y == k)).sum()
                joined[k] += ((label == k) | (y == k)).sum()
    mean = float(np.concatenate(found).mean())
    if made.task == "regression":
        return {"psnr": mean}
    return {"accuracy": mean, "iou": float((seen / joined).mean())}


def psnr(z: NDArray[np.generic], y: NDArray[np.generic]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image N×… on the scale 0–255, in dB, at most 60."""
    error = (z.astype(np.float64) - y.astype(np.float64)) ** 2
    mean = np.maximum(error.reshape(len(error), -1).mean(1), 255.0**2 / 1e6)
    return np.asarray(10 * np.log10(255.0**2 / mean))


def main(names: list[str]) -> None:
    """Print a line for each set, as it is made."""
    for name in names or NAMES:
        made = load(name)
        figures = ", ".join(f"{key} {value:.3f}" for key, value in quality(made).items())
        print(f"{name:18}{made.images:6} images of {made.photos:4} photos: {figures}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
