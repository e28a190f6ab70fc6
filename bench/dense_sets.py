"""Image-to-image data made of photo patches: super-resolution, denoising, segmentation.

Every set is a dictionary of columns of one length. ``image`` and ``target`` are uint8; ``photo``
names the photo behind a row, so that rows of one photo can be kept together. Image *i* of a seed
is the same whatever else is drawn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from bench.dense_assets import SIZE, Patches
from posthoc.tables import open_table

Columns = dict[str, NDArray[np.generic]]

SIGMA = 25  # standard deviation, of 255, of the noise that is the same everywhere
LOW, HIGH = 5, 50  # of the noise that differs from place to place
CLASSES = ("background", "ellipse", "rectangle", "triangle")
ANNOTATORS = 4
_ROWS = 256  # of a Parquet row group
# Directions in RGB, of length 1 and without grey, from which the tint of a class strays.
_HUES = np.array([[0, 0, 0], [2, -1, -1], [-1, 2, -1], [-1, -1, 2]]) / np.sqrt(6)
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5


def super_resolution(patches: Patches) -> Columns:
    """``image`` N×3×32×32 is ``target`` N×3×64×64, the photo itself, reduced by the bicubic filter
    (antialiased, rounded to 8 bits)."""
    small = (SIZE // 2, SIZE // 2)
    images = [
        np.asarray(Image.fromarray(p).resize(small, Image.Resampling.BICUBIC))
        for p in patches.pixels
    ]
    return {
        "image": channels_first(np.stack(images)),
        "target": channels_first(patches.pixels),
        "photo": _names(patches, np.arange(len(images))),
    }


def denoising(patches: Patches, seed: int) -> Columns:
    """``image`` N×3×64×64 is ``target`` plus normal noise, rounded and clipped to 8 bits.

    ``sigma`` N×64×64 (uint8) is the noise's standard deviation: 25 everywhere in every second
    row, a smooth field between 5 and 50 in the others.
    """
    rngs = [np.random.default_rng([seed, i]) for i in range(len(patches.pixels))]
    sigma = np.stack([noise_map(rng, even=i % 2 == 0) for i, rng in enumerate(rngs)])
    clean = channels_first(patches.pixels)
    noisy = np.stack([add_noise(*row) for row in zip(clean, sigma, rngs, strict=True)])
    return {
        "image": noisy,
        "target": clean,
        "sigma": sigma,
        "photo": _names(patches, np.arange(len(clean))),
    }


def noise_map(rng: np.random.Generator, *, even: bool) -> NDArray[np.uint8]:
    """Standard deviations 64×64, of 255: the same everywhere, or 4×4 uniform draws between which
    it changes linearly."""
    if even:
        return np.full((SIZE, SIZE), SIGMA, np.uint8)
    coarse = Image.fromarray(rng.uniform(LOW, HIGH, (4, 4)).astype(np.float32))
    return _bytes(np.array(coarse.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32))


def add_noise(
    clean: NDArray[np.uint8], sigma: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """C×H×W with independent normal noise of standard deviation H×W, as 8 bits hold it."""
    noise = rng.standard_normal(clean.shape, np.float32) * sigma
    return _bytes(clean + noise)


def segmentation(patches: Patches, n: int, seed: int) -> Columns:
    """``n`` photo patches with one to three shapes drawn on them, blurred and noisy.

    ``image`` n×3×64×64, ``target`` n×64×64 the class of each pixel (uint8, `CLASSES`) as drawn,
    ``annotations`` n×4×64×64 the same by annotators whose hands shake and who overlook faint
    shapes: the more, the softer the edge and the fainter the shape. A shape is filled with the
    mean of the patch and another of the same photo, tinted: ellipses rather red, rectangles green,
    triangles blue.
    """
    members = {int(p): np.flatnonzero(patches.photo == p) for p in np.unique(patches.photo)}
    images, targets, annotations, rows = [], [], [], []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        row = int(rng.integers(len(patches.photo)))
        other = int(rng.choice(members[int(patches.photo[row])]))
        image, masks = composite(patches.pixels[row], patches.pixels[other], rng)
        images.append(image)
        targets.append(masks[0])
        annotations.append(masks[1:])
        rows.append(row)
    return {
        "image": channels_first(np.stack(images)),
        "target": np.stack(targets),
        "annotations": np.stack(annotations),
        "photo": _names(patches, np.array(rows)),
    }


def composite(
    ground: NDArray[np.uint8], fill: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A patch with shapes drawn on it, 64×64×3, and 1 + 4 masks 64×64: as drawn, and as each
    annotator saw them."""
    image = ground.astype(np.float32)
    masks = np.zeros((1 + ANNOTATORS, SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(1, 4)):
        kind = int(rng.integers(1, len(CLASSES)))
        place = np.concatenate(
            [rng.uniform(10, SIZE - 10, 2), rng.uniform(8, 18, 2), rng.uniform(0, 2 * np.pi, 1)]
        )
        softness, opacity = rng.uniform(1, 6), rng.uniform(0.4, 1)
        tint = _HUES[kind] + 0.3 * rng.normal(size=3)
        tint *= rng.uniform(40, 130) / np.linalg.norm(tint)
        distance = outside(kind, place)
        alpha = opacity * np.clip(0.5 - distance / softness, 0, 1)[..., None]
        surface = 0.5 * ground + 0.5 * fill + tint
        image = (1 - alpha) * image + alpha * surface
        masks[0][distance < 0] = kind
        tremor = 0.4 + 0.25 * softness  # pixels
        scale = np.array([tremor, tremor, 0.05 * place[2], 0.05 * place[3], 0.06])
        for mask in masks[1:]:
            seen = outside(kind, place + scale * rng.normal(size=5)) < 0
            if rng.random() >= max(0.0, 0.6 - opacity):
                mask[seen] = kind
    image = gaussian_filter(image, (s := rng.uniform(0, 1.5), s, 0))
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(2, 12)
    return _bytes(image), masks


def outside(kind: int, place: NDArray[np.float64]) -> NDArray[np.float32]:
    """How far, in pixels, each of 64×64 pixel centres lies outside a shape (negative: inside;
    near the edge a distance). ``place`` is centre x, y, half width, half height, angle."""
    x, y, a, b, angle = (float(v) for v in place)
    dx, dy = _X - x, _Y - y
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    if CLASSES[kind] == "ellipse":
        away = (np.hypot(u / a, v / b) - 1) * min(a, b)
    elif CLASSES[kind] == "rectangle":
        away = np.maximum(np.abs(u) - a, np.abs(v) - b)
    else:  # isosceles: base 2a, height 2b
        slope = np.hypot(a, 2 * b)
        away = np.maximum(v - b, (2 * b * np.abs(u) - a * (v + b)) / slope)
    return np.asarray(away, np.float32)


def channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """N×H×W×3 -> N×3×H×W."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def write(columns: Columns, folder: Path) -> None:
    """``data.npz`` and, with fixed-shape tensor columns, ``data.parquet``, of the same rows."""
    np.savez_compressed(folder / "data.npz", allow_pickle=False, **columns)
    batches = open_table(folder / "data.npz").batches(_ROWS)
    table = pa.Table.from_batches(list(batches))
    pq.write_table(table, folder / "data.parquet", row_group_size=_ROWS, compression="zstd")


def _bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _names(patches: Patches, rows: NDArray[np.int64]) -> NDArray[np.str_]:
    return np.array(patches.names)[patches.photo[rows]]
