"""Folders of images: a file is a row, in the order of the names within its folder.

A colour image becomes height × width × 3 bytes (or 3 × height × width, as the model's only input
has it), for an input of one channel grey ones. An alpha channel and the orientation in a camera's
notes are left aside, and of several pictures in a file the first is taken. What an input of floats
is made of, is for the user to say: `Pixels`. Pillow decodes, the extra ``images``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from posthoc.contract import Array, DataError, TensorSpec
from service.scoring.errors import ScoringError, first_line
from service.scoring.formats.format import Filling, Format, Layout, Piece, Pixels, Wanted
from service.scoring.places import Found, Place

IMAGE = "image"
FILE = "file"
MAX_PIXELS = 1 << 26
MAX_FILE_BYTES = 256 << 20
SCHEMA = pa.schema(
    [
        pa.field(FILE, pa.string(), False, {"description": "path of the image below the input"}),
        pa.field(IMAGE, pa.null()),
    ]
)
_DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_CHANNELS = (1, 3)
_DEEP = ("I", "F")  # modes of more than 8 bits begin so


@dataclass(frozen=True, slots=True)
class Canvas:
    """How the model wants an image: ``size`` (height, width), -1 where it may be any, ``channels``
    at the ``axis`` 0 or 2 of a row, or at none, and the table of 256 values for each channel."""

    size: tuple[int, int]
    channels: int
    axis: int | None
    values: Array

    @property
    def free(self) -> bool:
        """Whether images may differ in size."""
        return -1 in self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row, -1 where it is free."""
        if self.axis is None:
            return self.size
        return (self.channels, *self.size) if self.axis == 0 else (*self.size, self.channels)

    def array(self, pixels: Array) -> Array:
        """Height × width × channels bytes → a row of the input."""
        row = np.stack([self.values[c][pixels[..., c]] for c in range(self.channels)], axis=-1)
        if self.axis == 0:
            return row.transpose(2, 0, 1)
        return row if self.axis == 2 else row[..., 0]


def canvas(spec: TensorSpec, pixels: Pixels) -> Canvas:
    """What `read` makes for an input. Raises DataError for one that takes no images, and where
    ``pixels`` says too little for it or what does not fit."""
    tail = spec.shape[1:]
    if len(tail) == 3 and tail[0] in _CHANNELS:
        channels, axis, size = tail[0], 0, tail[1:]
    elif len(tail) == 3 and tail[2] in _CHANNELS:
        channels, axis, size = tail[2], 2, tail[:2]
    elif len(tail) == 2:
        channels, axis, size = 1, None, tail
    else:
        shape = "×".join(["N", *("any" if d == -1 else str(d) for d in tail)])
        raise DataError(
            f"input {spec.name!r} takes {shape}; images fill N×H×W×3, N×3×H×W, the same with one "
            "channel, or N×H×W"
        )
    height, width = size
    if pixels.resize is not None:
        for got, want in zip(pixels.resize, (height, width), strict=True):
            if got < 1 or want not in (-1, got):
                shown = "×".join("any" if d == -1 else str(d) for d in (height, width))
                raise DataError(
                    f"images cannot be resized to {pixels.resize[0]}×{pixels.resize[1]}: input "
                    f"{spec.name!r} takes {shown}"
                )
        height, width = pixels.resize
    return Canvas((height, width), channels, axis, _values(spec, pixels, channels))


def _values(spec: TensorSpec, pixels: Pixels, channels: int) -> Array:
    """Channels × 256: what each byte becomes."""
    dtype = np.dtype(spec.dtype)
    every = np.arange(256)
    if dtype.kind != "f":
        if pixels.scale is not None or pixels.mean or pixels.std:
            raise DataError(
                f"input {spec.name!r} takes {spec.dtype}: pixels go in as they are, without a "
                "scale, mean or standard deviation"
            )
        if dtype.kind == "b" or np.iinfo(dtype).max < 255:
            raise DataError(f"input {spec.name!r} takes {spec.dtype}, which no pixel fits in")
        return np.broadcast_to(every.astype(dtype), (channels, 256))
    if pixels.scale is None:
        raise DataError(
            f"input {spec.name!r} takes {spec.dtype}: say what pixels are divided by with "
            "--image-scale (255 for values from 0 to 1, 1 to leave them from 0 to 255)"
        )
    work = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    parts = []
    for name, given, default in (("mean", pixels.mean, 0.0), ("std", pixels.std, 1.0)):
        if len(given) not in (0, 1, channels):
            raise DataError(
                f"--image-{name} has {len(given)} numbers; give one, or one for each of the "
                f"{channels} channels of input {spec.name!r}"
            )
        parts.append(np.broadcast_to(np.asarray(given or default, work), channels)[:, None])
    mean, std = parts
    if not np.isfinite([pixels.scale, *mean.flat, *std.flat]).all() or pixels.scale <= 0:
        raise DataError("--image-scale, --image-mean and --image-std must be finite, the scale > 0")
    if not (std > 0).all():
        raise DataError("--image-std must be above 0")
    scaled = every.astype(work) / np.asarray(pixels.scale, work)
    values: Array = ((scaled - mean) / std).astype(dtype)
    return values


def fill(filling: Filling, specs: Sequence[TensorSpec], schema: pa.Schema) -> Filling:
    """An image fills the model's only input. Raises DataError for a model of several."""
    if len(specs) != 1:
        names = ", ".join(s.name for s in specs)
        raise DataError(f"an image fills the one input of a model, and this one takes {names}")
    return {specs[0].name: (IMAGE,)}


def check(specs: Sequence[TensorSpec], pixels: Pixels, *, any_size: bool) -> None:
    """Raise DataError where images cannot fill the model's input, and without Pillow; ``any_size``
    where each image may have one of its own."""
    _pillow()
    (spec,) = specs
    like = canvas(spec, pixels)
    if like.free and not any_size:
        raise DataError(
            f"input {spec.name!r} takes images of any size, but those that run together need one: "
            "give --image-resize"
        )


def look(place: Place) -> Layout:
    """One row, whatever is in it: an image is decoded once, when it is read."""
    return Layout((1,), SCHEMA)


def read(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time. Raises ScoringError for a file whose bytes cannot be fetched."""
    like = canvas(wanted.inputs[IMAGE], wanted.pixels)
    resize = wanted.pixels.resize is not None
    size = wanted.rows(None)
    names = list(wanted.columns)
    for at in range(0, len(wanted.files), size):
        bad: dict[int, str] = {}
        rows: list[Array | None] = []
        files = wanted.files[at : at + size]
        for row, file in enumerate(files):
            found = _decoded(file, like, resize)
            if isinstance(found, str):
                bad[row] = f"{file.name.rsplit('/', 1)[-1]} {found}"
            rows.append(None if isinstance(found, str) else like.array(found))
        dtype, shape = like.values.dtype, like.shape
        columns = {
            FILE: pa.array([f.name for f in files], pa.string()),
            IMAGE: _lists(rows, dtype, len(shape)) if like.free else _tensors(rows, shape, dtype),
        }
        yield Piece(pa.record_batch([columns[n] for n in names], names=names), bad)


def _decoded(file: Found, like: Canvas, resize: bool) -> Array | str:
    """An image as height × width × channels bytes, or why it is none."""
    image = _pillow()
    if file.size > MAX_FILE_BYTES:
        return f"has {file.size:,} bytes, and at most {MAX_FILE_BYTES:,} are read"
    data = _fetched(file)
    try:
        with image.open(io.BytesIO(data), formats=_DECODERS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                return f"has {width}×{height} pixels, and at most {MAX_PIXELS:,} are read"
            if picture.mode[0] in _DEEP:
                return f"has pixels of mode {picture.mode!r}, and 8 bits a channel are read"
            fits = zip((height, width), like.size, strict=True)
            if not resize and any(want not in (-1, have) for have, want in fits):
                want = "×".join("any" if d == -1 else str(d) for d in like.size)
                return f"is {height}×{width} (height × width), expected {want}; see --image-resize"
            picture = picture.convert("RGB" if like.channels == 3 else "L")
            if resize and (height, width) != like.size:
                picture = picture.resize(like.size[::-1], image.Resampling.BILINEAR)
            return np.asarray(picture).reshape(*picture.size[::-1], like.channels)
    except Exception as e:  # Pillow's decoders raise a dozen unrelated types
        return f"cannot be decoded: {first_line(e)}"


def _fetched(file: Found) -> bytes:
    try:
        with file.place.open() as stored:
            return bytes(stored.read())
    except FileNotFoundError as e:
        raise ScoringError(f"input {file.place} vanished during the run") from e
    except OSError as e:
        raise ScoringError(
            f"input {file.place} cannot be fetched: {first_line(e)}; run the same command again "
            "to go on"
        ) from e


def _tensors(rows: Sequence[Array | None], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Images of one shape as a column of tensors; None is null."""
    none = np.zeros(shape, dtype)
    flat = np.stack([none if r is None else r for r in rows]).reshape(-1)
    missing = pa.array([r is None for r in rows])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat), prod(shape), mask=missing)
    kind = pa.fixed_shape_tensor(lists.type.value_type, shape)
    return pa.ExtensionArray.from_storage(kind, lists)


def _lists(rows: Sequence[Array | None], dtype: np.dtype[Any], ndim: int) -> Any:
    """Images of any shape as a column of nested lists; None is null."""
    shapes = [(0,) * ndim if r is None else r.shape for r in rows]
    parts = [np.empty(0, dtype), *(r.reshape(-1) for r in rows if r is not None)]
    lists = pa.array(np.concatenate(parts))
    for axis in reversed(range(ndim)):
        lengths = np.concatenate([np.full(prod(s[:axis]), s[axis]) for s in shapes])
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        missing = None if axis else pa.array([r is None for r in rows])
        lists = pa.ListArray.from_arrays(ends, lists, mask=missing)
    return lists


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise DataError("images are decoded by Pillow: pip install 'hedged[images]'") from e
    return Image


IMAGES = Format(
    "image",
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    look,
    read,
    fill,
    files_are_rows=True,
    keys=(FILE,),
)
