"""Folders of images: decoded as Pillow does, answered as the predictor does, bad ones told."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from calibration.predictor import Predictor
from hedged.cli import app
from posthoc.contract import DataError, TensorSpec
from service.scoring import ScoringError, score
from service.scoring.formats.format import Pixels, Wanted
from service.scoring.formats.images import IMAGES, canvas
from service.scoring.places import files_below, open_place
from tests.service.scoring.conftest import outputs, tree
from tests.service.scoring.photos import (
    MEAN,
    SIZE,
    STD,
    classifier,
    pixels,
    restorer,
    scaled,
    write_photos,
)

WORD: dict[str, Any] = {"image_scale": 255, "image_mean": MEAN, "image_std": STD}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("photos") / "classifier")


def read(folder: Path, shape: tuple[int, ...], dtype: str, settings: Pixels) -> Any:
    """The column of images, and what is wrong with some."""
    files = files_below(open_place(folder))
    spec = TensorSpec(name="x", dtype=dtype, shape=(-1, *shape))
    wanted = Wanted(
        groups=range(len(files)),
        columns=["file", "image"],
        inputs={"image": spec},
        rows=lambda values: 100,
        count=len(files),
        files=files,
        pixels=settings,
    )
    (piece,) = IMAGES.read(open_place(folder), wanted)
    piece.batch.validate(full=True)
    return piece.batch.column(1), piece.bad


def test_a_folder_gives_the_predictors_answers(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    x = pixels(25, 0)
    names = write_photos(source / "a=1", x[:20]) + write_photos(source / "b c", x[20:], 20)
    (source / "a=1" / "photo 003.png").write_bytes(b"no photo")
    (source / "a=1" / "notes.txt").write_text("no image at all")
    summary = score(bundle, source, tmp_path / "out", batch_size=4, fragment_rows=8, **WORD)
    assert (summary.rows, summary.good, summary.fragments) == (25, 24, 4)
    parts = [f"a=1/images-{k:05d}-of-00003.parquet" for k in range(3)]
    assert outputs(tmp_path / "out") == [*parts, "b c/images.parquet"]
    predictor = Predictor(bundle, threads=1)
    inputs = scaled(x)
    inputs[3] = inputs[0]  # a bad row's place is taken by the first good one of its batch
    at = 0
    for part, rows in zip([*parts, "b c/images.parquet"], (8, 8, 4, 5), strict=True):
        got = pq.read_table(tmp_path / "out" / part, partitioning=None).to_pylist()
        good = [k for k in range(at, at + rows) if k != 3]
        assert [r["row"] for r in got] == [k % 20 for k in good]
        folder = part.rpartition("/")[0]
        assert [r["file"] for r in got] == [f"{folder}/{names[k]}" for k in good]
        answers = [
            predictor.run({"x": inputs[k : min(k + 4, at + rows)]})["probs"]
            for k in range(at, at + rows, 4)
        ]
        want = np.concatenate(answers)[[k - at for k in good]]
        np.testing.assert_array_equal(np.array([r["probs"] for r in got], np.float32), want)
        at += rows
    (error,) = pq.read_table(tmp_path / "out/_errors" / parts[0], partitioning=None).to_pylist()
    assert (error["source"], error["row"]) == ("a=1", 3)
    assert error["reason"].startswith("photo 003.png cannot be decoded: cannot identify image")


def test_bytes_go_in_as_they_are(tmp_path: Path) -> None:
    bundle = classifier(tmp_path / "raw", raw=True)
    x = pixels(6, 1)
    write_photos(tmp_path / "in", x)
    score(bundle, tmp_path / "in", tmp_path / "out")
    got = pq.read_table(tmp_path / "out" / "images.parquet")
    assert got["file"].to_pylist() == [f"photo {k:03d}.png" for k in range(6)]
    want = Predictor(bundle, threads=1).run({"x": x})["probs"]
    np.testing.assert_array_equal(np.array(got["probs"].to_pylist(), np.float32), want)
    one = score(bundle, tmp_path / "in" / "photo 004.png", tmp_path / "one")
    assert one.rows == 1
    with pytest.raises(DataError, match="takes uint8: pixels go in as they are, without a scale"):
        score(bundle, tmp_path / "in", tmp_path / "no", image_scale=255)


def test_photos_of_any_size(tmp_path: Path) -> None:
    bundle = restorer(tmp_path / "restorer")
    sizes = [(4, 5), (7, 3), (4, 5), (9, 9)]
    x = [pixels(1, k, size)[0] for k, size in enumerate(sizes)]
    for k, image in enumerate(x):
        write_photos(tmp_path / "in", image[None], k)
    (tmp_path / "in" / "photo 0015.png").write_bytes(b"")
    score(bundle, tmp_path / "in", tmp_path / "out", outputs=["mean"], max_error_ratio=0.5, **WORD)
    got = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    predictor = Predictor(bundle, threads=1)
    for row, image in zip(got, x, strict=True):
        want = predictor.run({"x": scaled(image[None])})["mean"][0]
        np.testing.assert_array_equal(np.array(row["mean"], np.float32), want)


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 5, 7), 0), ((5, 7, 3), 2), ((1, 5, 7), 0), ((5, 7, 1), 2), ((5, 7), 0)]
)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "float64", "float16"])
def test_layouts_and_dtypes(shape: tuple[int, ...], axis: int, dtype: str, tmp_path: Path) -> None:
    x = pixels(3, 5, (5, 7))
    write_photos(tmp_path, x)
    floats = dtype.startswith("float")
    settings = Pixels(scale=100, mean=(0.5,), std=(0.25,)) if floats else Pixels()
    column, bad = read(tmp_path, shape, dtype, settings)
    want = x.astype(np.float64)
    if 3 not in shape:
        grey = [np.asarray(Image.fromarray(v).convert("L")) for v in x]
        want = np.stack(grey)[..., None].astype(np.float64)
    want = want.transpose(0, 3, 1, 2) if axis == 0 else want
    want = want.reshape(3, *shape)
    if floats:
        want = (want / 100 - 0.5) / 0.25
    got = column.to_numpy_ndarray()
    assert not bad and got.shape == (3, *shape) and got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-6)


def test_kinds_of_files(tmp_path: Path) -> None:
    rgb = pixels(1, 7, (5, 7))[0]
    picture = Image.fromarray(rgb)
    exact = {
        "a.bmp": picture,
        "b.TIF": picture,
        "c.webp": picture,
        "d.png": picture.convert("RGBA"),
        "e.png": picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256),
    }
    for name, image in exact.items():
        image.save(tmp_path / name, lossless=True)
    picture.save(tmp_path / "f.jpeg", quality=95)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 200).save(tmp_path / "g.png")
    Image.fromarray(rgb[..., 0].astype(np.float32)).save(tmp_path / "h.tif")
    picture.save(tmp_path / "i.png", format="GIF")
    (tmp_path / "j.png").write_bytes((tmp_path / "d.png").read_bytes()[:-40])
    picture.resize((8, 5)).save(tmp_path / "k.png")
    (tmp_path / "l.png").write_bytes(_png(1 << 14, 1 << 13))
    column, bad = read(tmp_path, (5, 7, 3), "uint8", Pixels())
    assert [r for r, v in enumerate(column) if v.as_py() is None] == list(range(6, 12))
    assert sorted(bad) == list(range(6, 12))
    assert "mode 'I;16', and 8 bits" in bad[6] and "mode 'F'" in bad[7]
    assert bad[8].startswith("i.png cannot be decoded") and "cannot be decoded" in bad[9]
    assert bad[10] == "k.png is 5×8 (height × width), expected 5×7; see --image-resize"
    assert "has 16384×8192 pixels, and at most" in bad[11] or "exceeds limit" in bad[11]
    for row in range(4):
        got = np.array(column[row].as_py(), np.uint8).reshape(5, 7, 3)
        np.testing.assert_array_equal(got, rgb)
    jpeg = np.array(column[5].as_py(), np.uint8).reshape(5, 7, 3)
    np.testing.assert_array_equal(jpeg, np.asarray(Image.open(tmp_path / "f.jpeg")))
    resized, bad = read(tmp_path, (4, 2, 3), "uint8", Pixels(resize=(4, 2)))
    assert sorted(bad) == [6, 7, 8, 9, 11]
    want = np.asarray(picture.resize((2, 4), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(np.array(resized[0].as_py(), np.uint8).reshape(4, 2, 3), want)


def _png(width: int, height: int) -> bytes:
    """A small file that says it is a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


@pytest.mark.parametrize(
    ("shape", "dtype", "settings", "message"),
    [
        ((4,), "float32", Pixels(scale=1), "takes N×4; images fill"),
        ((2, 5, 7), "float32", Pixels(scale=1), "takes N×2×5×7; images fill"),
        ((3, 5, 7), "float32", Pixels(), "say what pixels are divided by with --image-scale"),
        ((3, 5, 7), "float32", Pixels(scale=1, mean=(1, 2)), "--image-mean has 2 numbers"),
        ((3, 5, 7), "float32", Pixels(scale=0), "the scale > 0"),
        ((3, 5, 7), "float32", Pixels(scale=1, std=(0,)), "above 0"),
        ((3, 5, 7), "float32", Pixels(scale=1, mean=(float("nan"),)), "must be finite"),
        ((3, 5, 7), "uint8", Pixels(mean=(1,)), "go in as they are"),
        ((3, 5, 7), "int8", Pixels(), "which no pixel fits in"),
        ((3, 5, 7), "uint8", Pixels(resize=(7, 5)), "cannot be resized to 7×5: .* takes 5×7"),
        ((3, -1, 7), "uint8", Pixels(resize=(0, 7)), "cannot be resized to 0×7"),
    ],
)
def test_what_cannot_be_meant(
    shape: tuple[int, ...], dtype: str, settings: Pixels, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        canvas(TensorSpec(name="x", dtype=dtype, shape=(-1, *shape)), settings)


def test_settings_and_files_are_pinned(bundle: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_photos(source, pixels(12, 0))
    score(bundle, source, out, fragment_rows=4, **WORD)
    before = tree(out)
    with pytest.raises(ScoringError, match=r"settings pixels was .*255\.0.*, is .*254\.0"):
        score(bundle, source, out, fragment_rows=4, **{**WORD, "image_scale": 254})
    with pytest.raises(DataError, match="are for folders of images; these are Parquet files"):
        score(bundle, out, tmp_path / "no", **WORD)
    (out / "images-00001-of-00003.parquet").unlink()
    assert score(bundle, source, out, fragment_rows=4, **WORD).resumed == 2
    assert tree(out) == before
    # Neither the sum of the sizes nor the last time of change tells of this.
    a, b = (source / f"photo {k:03d}.png" for k in (1, 2))
    a.rename(source / "c")
    b.rename(a)
    (source / "c").rename(b)
    with pytest.raises(ScoringError, match=r"input file \. was changed"):
        score(bundle, source, out, fragment_rows=4, **WORD)


def test_without_pillow(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "in", pixels(2, 0))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'hedged\[images\]'"):
        score(bundle, tmp_path / "in", tmp_path / "out", **WORD)


@pytest.mark.parametrize("what", ["vanished", "changed"])
def test_an_image_that_moves_under_the_run_stops_it(
    bundle: Path, tmp_path: Path, what: str
) -> None:
    source = tmp_path / "in"
    write_photos(source, pixels(12, 0))
    last = source / "photo 011.png"

    def pull(progress: Any) -> None:
        if progress.fragments_done == 1 and last.exists():
            last.unlink() if what == "vanished" else os.utime(last, ns=(1, 1))

    with pytest.raises(ScoringError, match=rf"photo 011\.png {what} during the run"):
        score(bundle, source, tmp_path / "out", fragment_rows=4, progress=pull, **WORD)
    assert "images-00002-of-00003.parquet" not in outputs(tmp_path / "out")


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "in", pixels(3, 0, (12, 16)))
    options = ["--image-scale", "255", "--image-mean", ".4,.5,.6", "--image-std", ".2,.3,.25"]
    command = ["score", str(bundle), str(tmp_path / "in"), str(tmp_path / "out"), *options]
    done = CliRunner().invoke(app, [*command, "--image-resize", "6x8"])
    assert done.exit_code == 0, done.output
    same = tmp_path / "same"
    score(bundle, tmp_path / "in", same, image_resize=SIZE, **WORD)
    assert tree(same) == tree(tmp_path / "out")
    wrong = CliRunner().invoke(app, [*command, "--image-resize", "6"])
    assert wrong.exit_code == 2 and "HEIGHTxWIDTH" in wrong.output
