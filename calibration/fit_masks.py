"""A mask that misses at most a share of a class: false-negative control for segmentation.

The set of a pixel holds the class where its score is at most the threshold, so those pixels are a
mask of it. The loss of an image is the share of the class's pixels that the mask misses, and the
threshold holds its mean over images that show the class at alpha or below (conformal risk control,
Angelopoulos et al. 2022, arXiv:2208.02814). Pixels drawn from the whole image would not do, because
an image of which no positive was drawn would count as one without a loss: here they are drawn among
the positives of each conformal image.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from calibration.conformal.risk import control_risk
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import Fitted, promise, run_head
from calibration.material import ROLES, Material, one_per_key
from posthoc import logits
from posthoc.contract import Array, Features, FitError
from posthoc.data import open_table, to_rows
from posthoc.frozen import expose
from posthoc.pixels import draw, pixels, target_pixels, target_shape
from posthoc.runtime import open_session

_READ = 16  # images in one run


def control_misses(
    fitted: Fitted, material: Material, data: str | Path, roles: Array, options: FitOptions
) -> Fitted:
    """The head with the threshold at which the mask of ``options.mask`` misses at most alpha.

    Raises FitError for a model without maps, a class that it does not have, and where no conformal
    image shows the class.
    """
    c, dense = options.mask, material.frozen.dense
    assert c is not None
    if dense is None:
        raise FitError("--mask is for models whose output is a map of classes")
    if not 0 <= c < fitted.head.width:
        raise FitError(f"--mask {c}: the model has classes 0 to {fitted.head.width - 1}")
    rows = one_per_key(material.cache, material.usable[roles == ROLES.index("conformal")])
    scores = _scores(fitted, material, data, rows[:: material.per] // material.per, c)
    if not len(scores):
        raise FitError(f"--mask {c}: no conformal image has a pixel of this class")
    guarantees = tuple(promise(r, "missed") for r in control_risk(scores, options.alphas))
    q = guarantees[0].threshold
    settings = {**fitted.conformal.settings, "mask": c}
    return dataclasses.replace(
        fitted,
        head=fitted.head.with_(q_hat=math.inf if q is None else q),
        conformal=fitted.conformal.model_copy(
            update={"settings": settings, "guarantees": guarantees}
        ),
        scores={**fitted.scores, "set": scores},
    )


def _scores(fitted: Fitted, material: Material, data: str | Path, images: Array, c: int) -> Array:
    """The class's score at drawn pixels of the class, n×P float32, for the images that show it."""
    frozen, dense, link = material.frozen, material.frozen.dense, material.link
    assert dense is not None
    session = open_session(expose(frozen))
    names = [n for n in (frozen.z, frozen.phi) if n is not None]
    maps = target_shape(dense, "classification", frozen.z_dim)
    columns = material.mapping.columns(target=True)
    found: list[Array] = []
    start = 0
    for batch in open_table(data).batches(_READ, columns):
        inside = images[(images >= start) & (images < start + batch.num_rows)] - start
        start += batch.num_rows
        if not len(inside):
            continue
        read = to_rows(
            batch,
            material.mapping,
            frozen.inputs,
            task="classification",
            classes=material.classes,
            n_classes=fitted.head.width,
            maps=maps,
        )
        assert read.y is not None
        values = session.run(names, {k: v[inside] for k, v in read.inputs.items()})
        axes = (dense.axis, dense.phi_axis)
        flat = [pixels(np.asarray(v), a) for v, a in zip(values, axes, strict=False)]
        y = target_pixels(read.y[inside], dense, "classification", flat[0].shape[1])
        shown = np.flatnonzero((y == c).any(1))
        if not len(shown):
            continue
        index = draw(read.content_hashes[inside][shown], y[shown] == c, material.per)
        taken = [f[shown[:, None], index].reshape(-1, f.shape[2]) for f in flat]
        phi = taken[1] if frozen.phi is not None else None
        made = run_head(fitted.head, Features(phi, logits.to_logits(taken[0], link)))
        found.append(made["set_scores"][:, c].reshape(len(shown), -1))
    return np.concatenate(found) if found else np.empty((0, material.per), np.float32)
