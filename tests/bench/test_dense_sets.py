"""Dense data sets: every column against its definition, and the same again from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import dense_sets as sets
from bench.dense_assets import Patches
from posthoc.contract import TensorSpec
from posthoc.data import TableMapping, to_rows
from posthoc.tables import open_table


def _patches(n: int, photos: int = 3, grey: int | None = None) -> Patches:
    rng = np.random.default_rng(0)
    # Not to the ends of the scale, so that no filter overshoots it.
    pixels = rng.integers(60, 196, (n, 16, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    if grey is not None:
        pixels[:] = grey
    return Patches(pixels, np.sort(np.arange(n) % photos), tuple("abcdefgh"[:photos]))


def test_super_resolution_against_torch() -> None:
    given_ = _patches(5)
    made = sets.super_resolution(given_)
    assert {k: (v.shape, v.dtype.kind) for k, v in made.items()} == {
        "image": ((5, 3, 32, 32), "u"),
        "target": ((5, 3, 64, 64), "u"),
        "photo": ((5,), "U"),
    }
    assert np.array_equal(made["target"].transpose(0, 2, 3, 1), given_.pixels)
    assert made["photo"].tolist() == ["a", "a", "b", "b", "c"]
    want = torch.nn.functional.interpolate(
        torch.from_numpy(made["target"].astype(np.float32)),
        size=32,
        mode="bicubic",
        antialias=True,
    ).clamp(0, 255)
    assert np.abs(want.numpy() - made["image"].astype(np.float32)).max() < 1.5


def test_noise_has_the_deviation_that_it_says() -> None:
    made = sets.denoising(_patches(60, grey=128), seed=1)
    noise = made["image"].astype(float) - made["target"]
    sigma = made["sigma"].astype(float)
    assert (sigma[::2] == sets.SIGMA).all()
    assert sets.LOW <= sigma[1::2].min() < 15
    assert 40 < sigma[1::2].max() <= sets.HIGH
    ratio = noise / np.sqrt(sigma[:, None] ** 2 + 1 / 12)  # and the rounding's
    assert ratio[::2].std() == pytest.approx(1, abs=0.01)
    assert ratio[1::2].std() == pytest.approx(1, abs=0.02)  # a little is clipped
    for low in (5, 20, 35):
        there = (sigma >= low) & (sigma < low + 10)
        assert ratio.transpose(0, 2, 3, 1)[there].std() == pytest.approx(1, abs=0.03)
    assert abs(ratio.mean()) < 0.01
    assert np.abs(np.diff(sigma, axis=1)).max() <= 5  # a smooth field


def test_an_image_is_the_same_whatever_else_is_drawn() -> None:
    given_ = _patches(9)
    few, many = (sets.segmentation(given_, n, seed=2) for n in (3, 6))
    assert all(np.array_equal(few[k], many[k][:3]) for k in few)
    other = sets.segmentation(given_, 3, seed=3)
    assert not np.array_equal(few["image"], other["image"])
    first = Patches(given_.pixels[:4], given_.photo[:4], given_.names)
    some, all_ = sets.denoising(first, 0), sets.denoising(given_, 0)
    assert all(np.array_equal(some[k], all_[k][:4]) for k in some)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    kind=st.sampled_from([1, 2, 3]),
    a=st.floats(5, 14),
    b=st.floats(5, 14),
    angle=st.floats(0, 6.2),
)
def test_shapes_have_their_area_and_centre(kind: int, a: float, b: float, angle: float) -> None:
    away = sets.outside(kind, np.array([31.0, 33.0, a, b, angle]))
    inside = away < 0
    area = {1: np.pi * a * b, 2: 4 * a * b, 3: 2 * a * b}[kind]
    edge = 4 * (a + b)
    assert abs(int(inside.sum()) - area) <= 0.5 * edge  # at most a row and a column
    y, x = np.nonzero(inside)
    # The triangle's centroid lies a third of its height (2b) above its base.
    low = b / 3 if kind == 3 else 0
    want = 31 - np.sin(angle) * low, 33 + np.cos(angle) * low
    assert (x.mean() + 0.5, y.mean() + 0.5) == pytest.approx(want, abs=0.7)
    assert np.abs(np.diff(away, axis=0)).max() <= 2.9  # ellipses stretch; else at most one
    if kind != 1:
        assert np.abs(np.diff(away, axis=1)).max() < 1.001


def test_annotators_agree_on_most_and_not_on_all() -> None:
    made = sets.segmentation(_patches(12), 40, seed=0)
    assert made["image"].shape == (40, 3, 64, 64)
    assert made["annotations"].shape == (40, sets.ANNOTATORS, 64, 64)
    assert set(np.unique(made["target"])) == {0, 1, 2, 3}
    assert set(made["photo"].tolist()) <= {"a", "b", "c"}
    wrong = (made["annotations"] != made["target"][:, None]).mean((2, 3))
    assert wrong.mean() < 0.1
    assert (wrong > 0).mean() > 0.9
    # None of them is the better one, and none copies another.
    assert wrong.mean(0).max() < 1.6 * wrong.mean(0).min()
    first, second = made["annotations"][:, 0], made["annotations"][:, 1]
    assert (first != second).any((1, 2)).mean() > 0.9


def test_both_tables_hold_the_same_rows(tmp_path: Path) -> None:
    made = sets.segmentation(_patches(6), 7, seed=0)
    sets.write(made, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "data.parquet"]
    specs = [TensorSpec(name="image", dtype="float32", shape=(-1, 3, 64, 64))]
    mapping = TableMapping(inputs={"image": ("image",)}, split_by="photo")
    found = []
    for name in ("data.npz", "data.parquet"):
        table = open_table(tmp_path / name)
        assert table.columns == ("image", "target", "annotations", "photo")
        (batch,) = table.batches(100)
        found.append(to_rows(batch, mapping, specs))
        kind = batch.schema.field("annotations").type
        assert tuple(kind.shape) == (4, 64, 64)
    assert np.array_equal(found[0].inputs["image"], made["image"].astype(np.float32))
    assert np.array_equal(found[0].inputs["image"], found[1].inputs["image"])
    assert np.array_equal(found[0].split_keys, found[1].split_keys)
    assert len(np.unique(found[0].split_keys)) == len(np.unique(made["photo"]))
