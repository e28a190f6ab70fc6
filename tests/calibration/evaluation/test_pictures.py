"""PNG files read back byte by byte, and what the pictures of a report show."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calibration.evaluation import png
from calibration.evaluation.pictures import SIDE, Layer, Scene, choose, draw, photo
from posthoc.contract import DataError


def decode(data: bytes) -> np.ndarray:
    """H×W×3 of a PNG of unfiltered 8-bit rows, every checksum compared."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack_from(">I", data, at + 8 + size)
        assert crc == zlib.crc32(name + body)
        chunks[name] = body
        at += 12 + size
    assert list(chunks)[-1] == b"IEND"
    width, height, depth, kind, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert depth == 8 and rest == [0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    if kind == 2:
        return rows[:, 1:].reshape(height, width, 3)
    assert kind == 3
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[rows[:, 1:]]


sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(sizes.flatmap(lambda s: arrays.arrays(np.uint8, (*s, 3))))
def test_colours_come_back(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(png.encode(pixels)), pixels)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(sizes.flatmap(lambda s: arrays.arrays(np.uint8, s)), st.booleans())
def test_indices_come_back_as_colours(pixels: np.ndarray, heat: bool) -> None:
    palette = png.heat_palette() if heat else png.class_palette()
    np.testing.assert_array_equal(decode(png.encode(pixels, palette)), palette[pixels])


@pytest.mark.parametrize(
    ("pixels", "palette"),
    [
        (np.zeros((2, 2, 3)), None),
        (np.zeros((2, 2), np.uint8), None),
        (np.zeros((0, 2, 3), np.uint8), None),
        (np.full((2, 2), 3, np.uint8), np.zeros((3, 3), np.uint8)),
    ],
)
def test_what_is_no_picture_is_refused(pixels: np.ndarray, palette: np.ndarray | None) -> None:
    with pytest.raises(DataError, match=r"PNG|palette"):
        png.encode(pixels, palette)


def test_palettes() -> None:
    heat = png.heat_palette()[: png.BLANK].astype(float)
    light = heat @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > -1).all() and light[-1] - light[0] > 180
    colours = png.class_palette()
    assert len(colours) == 256 and len(np.unique(colours[:21], axis=0)) == 21
    assert png.hex_colour(np.array([0, 128, 255])) == "#0080ff"


def test_which_images_are_shown() -> None:
    error = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
    assert choose(error) == {"Hardest": 2, "Median": 0, "Easiest": 1}
    found = choose(error, np.array([0, 0, 0, 1, 0]))
    assert found["Least covered"] == 3
    assert "Least covered" not in choose(error, np.array([0, 0, 1, 0, 0]))
    assert choose(np.array([1.0])) == {"Hardest": 0}


def test_what_looks_like_a_picture() -> None:
    grey, first, last = np.zeros((1, 8, 9)), np.zeros((3, 8, 9)), np.zeros((8, 9, 3))
    for x, shape in ((grey, (8, 9)), (first, (8, 9, 3)), (last, (8, 9, 3)), (grey[0], (8, 9))):
        found = photo({"meta": np.zeros(4), "x": x})
        assert found is not None and found.shape == shape
    assert photo({"x": np.zeros((7, 8, 9)), "y": np.zeros(5)}) is None


def scene(title: str, scale: float) -> Scene:
    x = np.linspace(0, 1, 60).reshape(6, 10)
    label = np.repeat([[0], [1], [5], [0], [1], [-1]], 10, axis=1)
    blank = np.where(label < 0, np.nan, scale * x)
    layers = (
        Layer("Input", "photo", x),
        Layer("Prediction", "classes", np.abs(label)),
        Layer("Truth", "classes", label),
        Layer("Entropy", "heat", blank),
        Layer("Colours", "values", np.repeat(x[..., None], 3, 2)),
    )
    return Scene(title, "Row 3", 3, layers)


def test_pictures_of_two_scenes() -> None:
    pictures, swatches = draw([scene("Hardest", 2.0), scene("Easiest", 0.5)], None)
    assert [p.title for p in pictures] == ["Hardest test image", "Easiest test image"]
    assert [name for name, _ in swatches] == ["class 0", "class 1", "class 5"]
    hard, easy = ({m.title.partition(",")[0]: m for m in p.maps} for p in pictures)
    images = {k: decode(base64.b64decode(m.png)) for k, m in hard.items()}
    assert all(i.shape == (6, 10, 3) for i in images.values())
    palette = png.class_palette()
    np.testing.assert_array_equal(images["Truth"][5, 0], palette[png.BLANK])
    np.testing.assert_array_equal(images["Truth"][2, 4], palette[5])
    assert swatches[2][1] == png.hex_colour(palette[5])
    # One scale for both: the easy scene's largest value is a quarter of the way up.
    light = decode(base64.b64decode(easy["Entropy"].png))
    assert hard["Entropy"].title == easy["Entropy"].title
    assert light[4].astype(int).sum(1).max() < images["Entropy"][4].astype(int).sum(1).max()
    np.testing.assert_array_equal(light[5, 0], png.heat_palette()[png.BLANK])
    assert images["Input"][0, 0].max() == 0 and images["Input"][5, 9].min() == 254
    assert hard["Truth"].alt == (
        "Truth of the hardest test image: 33 % class 0, 33 % class 1, 17 % class 5"
    )
    assert hard["Entropy"].alt.startswith("Entropy of the hardest test image: from 0 to 1.6")


def test_names_of_classes() -> None:
    _, swatches = draw([scene("Hardest", 1.0)], ["a", "b", "c", "d", "e", "f"])
    assert [name for name, _ in swatches] == ["a", "b", "f"]


def test_large_maps_are_thinned_and_flat_ones_drawn() -> None:
    big = np.zeros((500, 900))
    big[:, 450:] = 1
    big[:5, :5] = np.nan
    layers = (
        Layer("Heat", "heat", big),
        Layer("Class", "classes", np.nan_to_num(big).astype(int)),
        Layer("Flat", "heat", np.full((500, 900), 3.0)),
    )
    (picture,), _ = draw([Scene("Hardest", "", 0, layers)], None)
    for m in picture.maps:
        image = decode(base64.b64decode(m.png))
        assert max(image.shape) <= SIDE and image.shape[0] == pytest.approx(100, abs=1)
    heat = decode(base64.b64decode(picture.maps[0].png))
    np.testing.assert_array_equal(heat[0, 0], png.heat_palette()[png.BLANK])
    np.testing.assert_array_equal(heat[50, 0], png.heat_palette()[0])
    np.testing.assert_array_equal(heat[50, -1], png.heat_palette()[png.BLANK - 1])
