"""Photos for dense (per-pixel) tasks, cut into patches; each patch knows its photo.

They come from packages that ship photos under free licences (`bench.dense_pins` names the
licences); nothing of them is committed. ``python -m bench.dense_assets`` counts them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.assets import cached, fetch
from bench.rcc import read_rcc

VERSION = 1  # raise it when the photos or the cutting change: it names the cache folder
SIZE = 64  # pixels, each side of a patch
PER_PHOTO = 12  # patches, at most
LONGEST = 512  # pixels: a larger photo is reduced to it, so that a patch shows more than a blur
FLAT = 4.0  # standard deviation, of 255, below which a patch shows nothing
SAME = 0.95  # correlation of two thumbnails from which on they show one photo
SEED = 0
SOURCES = ("skimage", "sklearn", "opencv", "lomiri", "interior", "gcompris")
_PICTURES = (".jpg", ".png", ".webp")
# In GCompris's resources: not photos, or without a free-media licence in the package's list.
_LEFT_OUT = {
    "alphabets", "numbers", "brandenburgGate", "windmill6", "cuttingTool", "hammer6", "hammer7",
    "hammer8", "hammer9", "measuringTape5", "measuringTape6", "multimeter3", "plier3", "plier4",
    "scissors1", "scissors3", "scissors4", "spray", "bison", "giraffe", "hedgehog", "jaguar",
    "kangaroo", "narwhal",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo in colour: its source and file name, and its pixels H×W×3, uint8."""

    name: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Patches:
    """N patches N×64×64×3 (uint8, sRGB); ``photo`` is the index of each one's photo in
    ``names``, whose photos hold the patches of one index and no others."""

    pixels: NDArray[np.uint8]
    photo: NDArray[np.int64]
    names: tuple[str, ...]

    def of(self, photos: NDArray[np.int64]) -> Patches:
        """The patches of these photos, all names kept."""
        wanted = np.isin(self.photo, photos)
        return Patches(self.pixels[wanted], self.photo[wanted], self.names)


def photos() -> Iterator[Photo]:
    """Every photo once, at most 512 pixels long; a copy of an earlier one, of whatever size, is
    passed over. Raises HedgedError for a package that cannot be fetched."""
    seen: list[NDArray[np.float64]] = []
    for source in SOURCES:
        for name, data in _files(source):
            photo = Photo(f"{source}/{name}", decode(data))
            thumbnail = _thumbnail(photo.pixels)
            if not any(float(thumbnail @ other) > SAME for other in seen):
                seen.append(thumbnail)
                yield photo


def decode(data: bytes | Path) -> NDArray[np.uint8]:
    """A picture file as H×W×3, reduced so that its longer side is at most 512 pixels."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
        file.draft("RGB", (2 * LONGEST, 2 * LONGEST))  # a large JPEG is decoded reduced
        image = file.convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        return np.array(image)


def cut(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """At most 12 different cells 64×64 of a grid thrown over the photo, without those that show
    nothing: n×64×64×3."""
    starts = [int(rng.integers(side % SIZE + 1)) for side in pixels.shape[:2]]
    rows, columns = (side // SIZE for side in pixels.shape[:2])
    whole = pixels[starts[0] :, starts[1] :][: rows * SIZE, : columns * SIZE]
    cells = whole.reshape(rows, SIZE, columns, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    cells = cells[cells.std((1, 2)).mean(1) >= FLAT] if len(cells) else cells
    return cells[rng.permutation(len(cells))[:PER_PHOTO]]


def patches() -> Patches:
    """The patches of every photo, from the cache after the first call."""
    folder = cached(f"dense-patches-{VERSION}", _make)
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    pixels, photo = (np.load(folder / f"{n}.npy") for n in ("pixels", "photo"))
    return Patches(pixels, photo, tuple(names))


def shares(n: int, part: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of ``n`` photos in two: the share that networks are trained on, and the others."""
    order = np.random.default_rng(SEED).permutation(n)
    first = round(part * n)
    return np.sort(order[:first]), np.sort(order[first:])


def _make(folder: Path) -> None:
    rng = np.random.default_rng(SEED)
    names, found = [], []
    for photo in photos():
        cells = cut(photo.pixels, rng)
        if len(cells):
            names.append(photo.name)
            found.append(cells)
    np.save(folder / "pixels.npy", np.concatenate(found))
    np.save(folder / "photo.npy", np.repeat(np.arange(len(found)), [len(c) for c in found]))
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")


def _files(source: str) -> Iterator[tuple[str, bytes | Path]]:
    """Name and content of the pictures of a source, in the order of their names."""
    for path in sorted(fetch(f"{source}-photos").iterdir()):
        if path.suffix != ".rcc":
            yield path.name, path
            continue
        for name, content in sorted(read_rcc(path.read_bytes()).items()):
            inside = Path(name)
            if (
                inside.suffix in _PICTURES
                and "resource" in inside.parts
                and inside.stem not in _LEFT_OUT
            ):
                yield f"{path.stem}/{inside.name}", content


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """16×16 grey values of mean 0 and length 1, flat."""
    small = Image.fromarray(pixels).convert("L").resize((16, 16), Image.Resampling.BOX)
    grey: NDArray[np.float64] = np.array(small, np.float64).ravel()
    grey -= grey.mean()
    length = float(np.linalg.norm(grey))
    return grey / length if length else grey


if __name__ == "__main__":
    for source in SOURCES:
        made = [name for name in patches().names if name.startswith(f"{source}/")]
        print(f"{source:10}{len(made):5} photos")
    print(f"{'together':10}{len(patches().names):5} photos, {len(patches().photo)} patches")
