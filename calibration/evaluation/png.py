"""PNG files from arrays (ISO/IEC 15948), and the colours that maps are drawn in."""

from __future__ import annotations

import colorsys
import struct
import zlib
from typing import Final

import numpy as np

from posthoc.contract import Array, DataError

BLANK: Final = 255  # palette index of a pixel without a value
_GREY = (138, 143, 152)
# Dark to light, so that it reads in grey too.
_HEAT = np.array([[16, 18, 43], [59, 47, 125], [161, 58, 124], [234, 106, 75], [253, 240, 190]])
_GOLDEN = 0.6180339887498949


def encode(pixels: Array, palette: Array | None = None) -> bytes:
    """A PNG of H×W×3 uint8, or of H×W uint8 indices into a ``palette`` (up to 256×3 uint8).

    Raises DataError for another shape or dtype, or an index outside the palette.
    """
    shape = (3,) if palette is None else ()
    if pixels.dtype != np.uint8 or pixels.ndim < 2 or pixels.shape[2:] != shape or not pixels.size:
        raise DataError(f"a PNG is made of uint8 pixels, not {pixels.dtype} of {pixels.shape}")
    if palette is not None and int(pixels.max()) >= len(palette):
        raise DataError(f"pixel value {pixels.max()} lies outside a palette of {len(palette)}")
    height, width = pixels.shape[:2]
    kind = 2 if palette is None else 3
    rows = pixels.reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", np.asarray(palette, np.uint8).tobytes()))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def heat_palette() -> Array:
    """255 colours from little to much, and grey for none, 256×3 uint8."""
    at = np.linspace(0, len(_HEAT) - 1, BLANK)
    ramp = np.stack([np.interp(at, np.arange(len(_HEAT)), c) for c in _HEAT.T], axis=1)
    return np.vstack([ramp.round(), _GREY]).astype(np.uint8)


def class_palette() -> Array:
    """A colour for each of 255 classes, the first a dark background, grey for none, 256×3 uint8."""
    colours = [(52.0, 58.0, 72.0)]
    for c in range(1, BLANK):
        hue, value = (0.55 + c * _GOLDEN) % 1, (0.95, 0.7)[c % 2]
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.62, value)
        colours.append((255 * red, 255 * green, 255 * blue))
    return np.vstack([np.round(colours), _GREY]).astype(np.uint8)


def hex_colour(colour: Array) -> str:
    """``#rrggbb``."""
    return "#" + "".join(f"{int(v):02x}" for v in colour)
