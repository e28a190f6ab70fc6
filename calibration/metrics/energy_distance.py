"""Generalised energy distance between segmentations drawn from a model and several annotators'.

Kohl et al. 2018, "A probabilistic U-Net for segmentation of ambiguous images", eq. 4:
``GED² = 2 E d(S,Y) - E d(S,S') - E d(Y,Y')`` with ``d = 1 - IoU``. Samples S must be whole
segmentations, one of each member or draw of a sampling module. A map of per-pixel probabilities
is not a distribution over segmentations: masks drawn from it pixel by pixel are grainy shapes
that no member holds, and their distance says nothing about the model. A deterministic model has
one sample, its label map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, DataError


@dataclass(frozen=True, slots=True)
class EnergyDistance:
    """GED² of one image and its parts, all in units of 1 - IoU.

    ``squared`` is at least 0 up to rounding, and 0 for equal multisets of masks. ``cross`` is the
    mean distance of samples to annotations, ``diversity`` that between samples and
    ``disagreement`` that between annotators, a mask paired with itself included.
    """

    squared: float
    cross: float
    diversity: float
    disagreement: float


def energy_distance(
    samples: Array, annotations: Array, classes: Sequence[int] | None = None
) -> EnergyDistance:
    """GED² of S segmentations S×… against A annotations A×… of one image, V-statistic form.

    Bool masks of one object, or class indices with the ``classes`` that count (leave the
    background out); the distance is then the mean over these classes. Two empty masks have
    distance 0, one empty mask is at 1. Raises DataError for shapes that do not match, no sample
    or annotation, and class indices without ``classes`` or the reverse.
    """
    s, y = np.asarray(samples), np.asarray(annotations)
    if s.ndim < 2 or s.shape[1:] != y.shape[1:] or not len(s) or not len(y):
        raise DataError(f"samples of shape {s.shape} do not match annotations of shape {y.shape}")
    if s.dtype.kind != y.dtype.kind and "b" in (s.dtype.kind, y.dtype.kind):
        raise DataError(f"samples are {s.dtype} where annotations are {y.dtype}")
    if (s.dtype.kind == "b") == (classes is not None) or s.dtype.kind not in "biu":
        raise DataError("give bool masks, or class indices together with the classes that count")
    values = [True] if classes is None else list(classes)
    if not values:
        raise DataError("classes is empty: no class counts")
    d = np.mean([_distances(np.concatenate([s == c, y == c])) for c in values], axis=0)
    n = len(s)
    cross, diversity = float(d[:n, n:].mean()), float(d[:n, :n].mean())
    disagreement = float(d[n:, n:].mean())
    return EnergyDistance(2 * cross - diversity - disagreement, cross, diversity, disagreement)


def image_energy_distances(
    samples: Sequence[Array],
    annotations: Sequence[Array],
    classes: Sequence[int] | None = None,
) -> dict[str, F64]:
    """Columns ``ged``, ``diversity`` and ``disagreement`` of N images for ``dense.image_figures``.

    Images may have different numbers of samples and annotators.
    """
    found = [energy_distance(s, y, classes) for s, y in zip(samples, annotations, strict=True)]
    return {
        "ged": np.array([f.squared for f in found], dtype=np.float64),
        "diversity": np.array([f.diversity for f in found], dtype=np.float64),
        "disagreement": np.array([f.disagreement for f in found], dtype=np.float64),
    }


def _distances(masks: Array) -> F64:
    """1 - IoU of every pair of K bool masks K×…, K×K; eight pixels a byte."""
    flat = np.packbits(masks.reshape(len(masks), -1), axis=1)
    words = np.zeros((len(flat), -(-flat.shape[1] // 8) * 8), dtype=np.uint8)
    words[:, : flat.shape[1]] = flat
    bits = words.view(np.uint64)
    size = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    d = np.zeros((len(bits), len(bits)))
    for i in range(len(bits)):
        shared = np.bitwise_count(bits[i] & bits[i:]).sum(axis=1, dtype=np.int64)
        union = size[i] + size[i:] - shared
        d[i, i:] = 1 - np.divide(shared, union, out=np.ones(len(union)), where=union > 0)
    return d + d.T  # the diagonal is 0
