"""Maps as the ledger and the metrics know them: a few numbers of each image, and no pixel of it.

The image is what is exchangeable, so an image counts once whatever its size. A label map cannot be
joined without the map that was predicted, which nothing here keeps: labels of a dense bundle are
refused, and `hedged evaluate` measures it on labelled images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from posthoc.contract import F64, Array, Task

_MEANS: dict[Task, tuple[str, ...]] = {
    "classification": ("confidence", "entropy", "set_size"),
    "regression": ("std",),
}
_SHARES = ("ood", "abstain")
_DRAWN = ("ood_pvalue",)


def summarised(task: Task) -> tuple[str, ...]:
    """The fields that `summary` is made of."""
    return (*_MEANS[task], *_SHARES, *_DRAWN)


def summary(task: Task, fields: Mapping[str, Array], ids: Sequence[str]) -> dict[str, F64]:
    """N numbers of each field of `summarised` that is there, from its N maps.

    ``confidence``, ``entropy``, ``set_size`` and ``std`` are means over the pixels (and outputs),
    ``ood`` and ``abstain`` shares of pixels. ``ood_pvalue`` is that of one pixel, drawn by a hash
    of the image's id: a mean of p-values is none, and one pixel of each image is what they were
    ranked among.
    """
    found: dict[str, F64] = {}
    for name in (*_MEANS[task], *_SHARES):
        if name in fields:
            maps = fields[name]
            found[name] = maps.reshape(len(maps), -1).mean(axis=1, dtype=np.float64)
    for name in _DRAWN:
        if name in fields:
            pixels = fields[name].reshape(len(ids), -1)
            drawn = [pixels[i, _draw(id, pixels.shape[1])] for i, id in enumerate(ids)]
            found[name] = np.asarray(drawn, np.float64)
    return found


def _draw(id: str, pixels: int) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest()) % pixels
