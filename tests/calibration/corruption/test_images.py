"""Corruptions of images against their definitions as slow loops, in every layout and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.corruption import images
from calibration.corruption.images import Range
from posthoc.contract import DataError

EVERY = (images.noise, images.blur, images.occlusion, images.contrast)
DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64")


def pictures(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 3, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -900), min(info.max, 900), shape).astype(dtype)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    corruption=st.sampled_from(EVERY),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=4),
    severity=st.integers(1, 5),
)
def test_dtype_shape_and_range_are_kept(
    corruption: Callable[..., Any], dtype: str, shape: list[int], severity: int
) -> None:
    x = pictures(dtype, (3, *shape[1:]))
    if x.min() == x.max():
        x.flat[0] += 1
    got = corruption(x, severity)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    assert x.min() <= got.min() and got.max() <= x.max()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    corruption=st.sampled_from(EVERY),
    dtype=st.sampled_from(("uint8", "float32", "float64")),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_severities_never_undo_one_another(
    corruption: Callable[..., Any], dtype: str, height: int, width: int
) -> None:
    x = pictures(dtype, (4, 3, height, width))
    # A filter takes more and more of the squares; of single distances that need not hold.
    power = 2 if corruption is images.blur else 1
    changes = [
        (np.abs(corruption(x, s, reference={"": whole(x)}).astype(float) - x) ** power).mean()
        for s in range(1, 6)
    ]
    # Bytes are rounded to whole ones, by up to a half.
    slack = 1e-9 if dtype != "uint8" else 0.5 if power == 1 else 2 * np.sqrt(changes[-1]) + 0.5
    assert all(a <= b + slack for a, b in pairwise(changes))


def whole(x: np.ndarray) -> Range:
    return Range(float(x.min()), float(x.max()), 1)


@pytest.mark.parametrize("corruption", EVERY)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_layouts_show_the_same_picture(corruption: Callable[..., Any], severity: int) -> None:
    x = pictures("float32", (5, 3, 8, 10))
    keys = np.arange(5)
    first = corruption(x, severity, keys=keys)
    last = corruption(np.moveaxis(x, 1, -1), severity, keys=keys)
    np.testing.assert_array_equal(np.moveaxis(last, -1, 1), first)
    one = corruption(x[:, :1], severity, reference={"": whole(x)}, keys=keys)
    flat = corruption(x[:, 0], severity, reference={"": whole(x)}, keys=keys)
    np.testing.assert_array_equal(one[:, 0], flat)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3, 8, 8), 1), ((2, 8, 8, 3), -1), ((2, 3, 5, 3), 1), ((2, 8, 8), None)]
)
def test_channels_are_found_by_size_or_told(shape: tuple[int, ...], axis: int | None) -> None:
    assert images.measure(pictures("float32", shape))[""].channels == axis
    told = images.measure(pictures("float32", (2, 3, 8, 2)), channels=1)[""]
    assert told.channels == 1


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_noise_has_its_deviation_and_its_ends(severity: int) -> None:
    share = images.NOISE[severity - 1]
    x = np.full((50, 1, 40, 40), 10.0)
    got = images.noise(x, severity, reference={"": Range(-90, 110, 1)})
    assert got.min() >= -90 and got.max() <= 110
    wide = images.noise(x, severity, reference={"": Range(-990, 1010, 1)})
    if share < 0.2:  # nearly nothing is cut
        assert (wide - 10).std() == pytest.approx(2000 * share, rel=0.02)
    # What is cut of a wider noise lies at the ends, and nothing else is moved.
    z = (images.noise(x, 1, reference={"": Range(-1e6, 1e6, 1)}) - 10) / (images.NOISE[0] * 2e6)
    np.testing.assert_allclose(got, np.clip(10 + share * 200 * z, -90, 110), atol=1e-6)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_blur_is_its_sum(severity: int) -> None:
    x = pictures("float64", (1, 2, 7, 9))
    sigma = images.BLUR[severity - 1] * 7
    radius = int(4 * sigma + 0.5)
    weights = {d: math.exp(-(d**2) / 2 / sigma**2) for d in range(-radius, radius + 1)}
    total = sum(weights.values())

    def mirrored(i: int, n: int) -> int:
        i %= 2 * n
        return i if i < n else 2 * n - 1 - i

    want = np.zeros_like(x)
    for c in range(2):
        for i in range(7):
            for j in range(9):
                for a, p in weights.items():
                    for b, q in weights.items():
                        value = x[0, c, mirrored(i + a, 7), mirrored(j + b, 9)]
                        want[0, c, i, j] += p * q * value / total**2
    np.testing.assert_allclose(images.blur(x, severity), want, atol=1e-12)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_occlusion_is_one_square_inside_anywhere(severity: int) -> None:
    x = np.zeros((3000, 2, 10, 12))
    got = images.occlusion(x, severity, reference={"": Range(0, 2, 1)}, keys=np.arange(3000))
    side = max(1, round(images.OCCLUSION[severity - 1] * 10))
    corners = set()
    for image in got[:, 0]:
        rows, columns = np.nonzero(image)
        assert len(rows) == side**2 and set(image[rows, columns]) == {1.0}
        assert np.ptp(rows) == np.ptp(columns) == side - 1
        corners.add((rows.min(), columns.min()))
    assert len(corners) == (10 - side + 1) * (12 - side + 1)
    np.testing.assert_array_equal(got[:, 0], got[:, 1])
    if severity > 1:
        less = images.occlusion(
            x, severity - 1, reference={"": Range(0, 2, 1)}, keys=np.arange(3000)
        )
        assert (got[less > 0] > 0).all()  # the smaller square lies within


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_contrast_is_its_definition(severity: int) -> None:
    x = pictures("float64", (3, 5, 6, 2))
    left = images.CONTRAST[severity - 1]
    want = np.empty_like(x)
    for i in range(3):
        for c in range(2):
            mean = sum(x[i, :, :, c].ravel()) / 30
            for p in range(5):
                for q in range(6):
                    want[i, p, q, c] = left * x[i, p, q, c] + (1 - left) * mean
    np.testing.assert_allclose(images.contrast(x, severity), want, atol=1e-12)


@pytest.mark.parametrize("corruption", EVERY)
def test_images_that_cannot_be_are_named(corruption: Callable[..., Any]) -> None:
    x = pictures("float32", (4, 3, 5, 5))
    with pytest.raises(DataError, match=r"no range between 0 and 0; give its least"):
        corruption(np.zeros((2, 3, 3)), 1)
    x[2, 1, 0, 0] = np.nan
    with pytest.raises(DataError, match="input 'x' holds a value that is not finite"):
        corruption({"x": x}, 1)
    with pytest.raises(DataError, match="input 'x': row 2 is not finite"):
        corruption({"x": x}, 1, reference={"x": Range(-1, 1, 1)})
    with pytest.raises(DataError, match="no tensor is N×C×H×W"):
        corruption({"x": np.zeros((3, 3))}, 1)
    with pytest.raises(DataError, match="holds no value"):
        corruption(np.zeros((0, 3, 3)), 1)
    with pytest.raises(DataError, match=r"beyond 2\*\*53"):
        corruption(np.array([[[0, 2**60]]]), 1)


def test_a_known_range_stands_for_the_data() -> None:
    x = np.full((2, 4, 4), 0.5, np.float32)
    known = images.measure(x, low=0, high=1)
    assert known[""] == Range(0, 1, None)
    got = images.noise(x, 5, reference=known)
    assert got.min() >= 0 and got.max() <= 1 and got.std() > 0.1
