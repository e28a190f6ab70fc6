"""What an image cap is trained on: windows of maps, and sums over them.

Maps are K×H×W, targets likewise with a NaN where a pixel has no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, FitError
from posthoc.methods.bayescap.generalised_gaussian import log_size

PIXELS = 200_000  # that anything but a network is fitted on


def check(z_maps: Sequence[Array], y_maps: Sequence[Array]) -> None:
    """FitError for fewer than two images, shapes that differ and maps that are not finite."""
    if len(z_maps) < 2 or len(z_maps) != len(y_maps):
        raise FitError(
            f"bayescap needs two images with targets at least and has {len(z_maps)} with "
            f"{len(y_maps)}"
        )
    for i, (z, y) in enumerate(zip(z_maps, y_maps, strict=True)):
        if z.ndim != 3 or z.shape != y.shape or len(z) != len(z_maps[0]):
            raise FitError(f"bayescap: image {i} has a map {z.shape} and targets {y.shape}")
        if not np.isfinite(z).all() or np.isinf(y).any():
            raise FitError(f"bayescap met an output or a target of image {i} that is not finite")


def scales(z_maps: Sequence[Array]) -> dict[str, F64]:
    """``mean`` K and ``scale`` K, one over the standard deviation and 0 for a constant channel."""
    n = sum(z[0].size for z in z_maps)
    mean = np.asarray(sum(z.sum((1, 2), dtype=np.float64) for z in z_maps)) / n
    away = sum(((z - mean[:, None, None]) ** 2).sum((1, 2)) for z in z_maps)
    sd = np.sqrt(np.asarray(away) / n)
    constant = sd <= 1e-7 * np.abs(mean)
    mean = mean.astype(np.float32).astype(np.float64)  # a graph subtracts what is subtracted here
    return {"mean": mean, "scale": np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, sd))}


def errors(z_maps: Sequence[Array], y_maps: Sequence[Array]) -> F64:
    """Errors n×K of pixels with targets, or of one in so many; FitError where there are none."""
    step = -(-sum(z[0].size for z in z_maps) // PIXELS)
    found = []
    for z, y in zip(z_maps, y_maps, strict=True):
        error = (np.asarray(y, np.float64) - z).reshape(len(z), -1).T[::step]
        found.append(error[np.isfinite(error).all(1)])
    if not sum(map(len, found)):
        raise FitError("bayescap: no pixel has a target in every channel")
    return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Cutter:
    """Random windows of one size: sides that show ``crop`` pixels and a ``margin`` about them, cut
    down to those of the smallest image, ``most``. Errors count as ``least`` K at least."""

    crop: int
    margin: int
    most: tuple[int, int]
    least: F64

    def __call__(self, z: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """z, log |y - z| and 1 where a pixel counts, K×h×w each, float32.

        Pixels count that have a target and lie a margin inside the window, or beside an edge that
        is the image's own.
        """
        cuts, inside = zip(
            *(
                self._side(length, most, rng)
                for length, most in zip(z.shape[1:], self.most, strict=True)
            ),
            strict=True,
        )
        z, y = z[:, cuts[0], cuts[1]], np.asarray(y[:, cuts[0], cuts[1]], np.float64)
        known = np.isfinite(y)
        log_r = log_size(np.where(known, y - z, 1.0), self.least[:, None, None])
        counts = known * np.outer(*inside)
        return z.astype(np.float32), log_r.astype(np.float32), counts.astype(np.float32)

    def _side(self, length: int, most: int, rng: np.random.Generator) -> tuple[slice, Array]:
        side = min(self.crop + 2 * self.margin, most)
        # Drawn from beyond the edges, so that pixels beside them count as often as others.
        beyond = self.margin + self.crop // 2
        begin = int(rng.integers(-beyond, length - side + beyond + 1))
        begin = min(max(begin, 0), length - side)
        place = np.arange(side)
        inside = (place >= self.margin) | (begin == 0)
        inside &= (place < side - self.margin) | (begin + side == length)
        return slice(begin, begin + side), inside


def smallest(z_maps: Sequence[Array], margin: int) -> tuple[int, int]:
    """The sides of the smallest image; FitError where a window of its size in a larger one would
    have no pixel that counts."""
    found: list[int] = []
    for axis in (1, 2):
        sides = [z.shape[axis] for z in z_maps]
        found.append(min(sides))
        if min(sides) <= 2 * margin < max(sides):
            raise FitError(
                f"bayescap: an image has a side of {min(sides)} pixels and the network sees "
                f"{margin} to each side; leave that image out or take fewer blocks"
            )
    return found[0], found[1]
