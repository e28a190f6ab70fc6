"""Photos and their patches: what is read, what is cut, what is kept together."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench import dense_assets as dense
from bench.rcc import read_rcc
from posthoc.contract import HedgedError

Tree = dict[str, "bytes | Tree"]


def _rcc(tree: Tree, packed: bool, version: int) -> bytes:
    """A resource file as Qt's compiler lays it out: nodes breadth first, children side by side."""
    tail = bytes(8) if version > 1 else b""
    names = contents = b""
    rows: list[bytes] = []
    queue: list[tuple[int, str, bytes | Tree]] = [(0, "", tree)]
    free = 1
    for at, name, value in queue:
        place = len(names)
        if at:
            names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(value, dict):
            head = struct.pack(">IHII", place, 2, len(value), free)
            queue += [(free + i, n, v) for i, (n, v) in enumerate(value.items())]
            free += len(value)
        else:
            stored = struct.pack(">I", len(value)) + zlib.compress(value) if packed else value
            head = struct.pack(">IHHHI", place, packed, 0, 1, len(contents))
            contents += struct.pack(">I", len(stored)) + stored
        rows.append(head + tail)
    body = b"".join(rows)
    header = struct.pack(">4sIIII", b"qres", version, 20, 20 + len(body), 0)
    start = 20 + len(body) + len(contents)
    return header[:16] + struct.pack(">I", start) + body + contents + names


_NAMES = st.text("abç", min_size=1, max_size=3)
_TREES = st.recursive(
    st.binary(max_size=20),
    lambda inner: st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    tree=st.dictionaries(_NAMES, _TREES, max_size=3),
    packed=st.booleans(),
    version=st.sampled_from([1, 2]),
)
def test_a_resource_file_read_back(tree: Tree, packed: bool, version: int) -> None:
    def flat(inside: Tree, path: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name, value in inside.items():
            if isinstance(value, dict):
                found |= flat(value, f"{path}{name}/")
            else:
                found[path + name] = value
        return found

    assert read_rcc(_rcc(tree, packed, version)) == flat(tree, "")


def test_resource_files_that_are_refused() -> None:
    good = _rcc({"a": b"some content"}, packed=True, version=1)
    with pytest.raises(HedgedError, match="does not begin with qres"):
        read_rcc(b"PK" + good[2:])
    for cut in (3, 25, 60):
        with pytest.raises(HedgedError, match="damaged Qt resource file"):
            read_rcc(good[:cut])
    zstd = bytearray(good)
    zstd[20 + 14 + 5] = 4  # flags of the node behind the root
    with pytest.raises(HedgedError, match="a is compressed with zstd"):
        read_rcc(bytes(zstd))


def test_a_picture_is_reduced_not_enlarged() -> None:
    rng = np.random.default_rng(0)
    for size, want in (((300, 200), (200, 300)), ((1024, 512), (256, 512))):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, "PNG")
        assert dense.decode(file.getvalue()).shape == (*want, 3)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(height=st.integers(10, 400), width=st.integers(10, 400), seed=st.integers(0, 9))
def test_patches_lie_in_the_photo_and_not_on_each_other(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Every pixel says where it is.
    y, x = np.mgrid[:height, :width]
    photo = np.stack([y % 256, x % 256, 16 * (y // 256) + x // 256], 2).astype(np.uint8)
    cells = dense.cut(photo, rng).astype(int)
    room = (height // 64) * (width // 64)
    assert cells.shape == (min(room, dense.PER_PHOTO), 64, 64, 3)
    rows = cells[..., 0] + 256 * (cells[..., 2] // 16)
    columns = cells[..., 1] + 256 * (cells[..., 2] % 16)
    places = rows * width + columns
    assert len(np.unique(places)) == places.size
    assert (rows.max((1, 2), initial=0) - rows.min((1, 2), initial=height) <= 63).all()


def test_flat_cells_are_left_out() -> None:
    photo = np.full((128, 128, 3), 200, np.uint8)
    assert len(dense.cut(photo, np.random.default_rng(0))) == 0


@pytest.mark.long
def test_the_photos() -> None:
    found = dense.patches()
    assert len(found.names) == len(set(found.names)) == 218
    assert {name.split("/")[0] for name in found.names} == set(dense.SOURCES)
    assert found.pixels.shape == (len(found.photo), 64, 64, 3)
    assert found.pixels.dtype == np.uint8
    counts = np.bincount(found.photo)
    assert len(counts) == 218
    assert (counts.min(), counts.max()) == (counts[counts > 0].min(), dense.PER_PHOTO)
    assert found.pixels.std((1, 2)).mean(1).min() >= dense.FLAT
    assert len({p.tobytes() for p in found.pixels}) == len(found.photo)  # no patch is there twice


def test_photos_are_shared_out_whole() -> None:
    found = dense.patches()
    first, second = dense.shares(len(found.names), 1 / 3)
    assert sorted([*first, *second]) == list(range(218))
    assert len(first) == 73
    parts = found.of(first), found.of(second)
    assert not set(parts[0].photo) & set(parts[1].photo)
    assert sum(len(p.photo) for p in parts) == len(found.photo)


def test_a_photo_under_two_names_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:256, :256]
    wave = np.uint8(127 + 120 * np.sin(x / 40) * np.cos(y / 60))
    picture = Image.fromarray(np.stack([wave, wave.T, 255 - wave], 2))

    def stored(image: Image.Image, kind: str) -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    files = [
        ("one.png", stored(picture, "PNG")),
        ("copy.jpg", stored(picture.resize((180, 180)), "JPEG")),
        ("other.png", stored(picture.transpose(Image.Transpose.TRANSPOSE), "PNG")),
    ]
    monkeypatch.setattr(dense, "SOURCES", ("made",))
    monkeypatch.setattr(dense, "_files", lambda source: iter(files))
    assert [p.name for p in dense.photos()] == ["made/one.png", "made/other.png"]
