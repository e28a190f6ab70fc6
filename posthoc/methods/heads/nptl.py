from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.links import softmax
from posthoc.methods.heads import members
from posthoc.methods.heads.blocks import PILOT, sizes, stream
from posthoc.methods.heads.losses import normalise


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    members: int = Field(default=20, ge=2)
    iterations: int = Field(default=30, ge=1)
    seed: int = 0
    prior_precision: float | None = Field(default=None, gt=0)
    alpha: float = 1.0


def fit(rows, head, task, settings):
    a = settings.alpha / rows.n

    def raw(index, size, m):
        return stream(settings.seed, 0, index, m).standard_exponential(size), stream(
            settings.seed, 1, index, m
        ).standard_gamma(a, size)

    tot = np.array(
        [
            sum(sum(x.sum() for x in raw(i, s, m)) for i, s in sizes(rows.n))
            for m in range(settings.members)
        ]
    ) / (rows.n * (1 + a))

    def loss(block, logits, who):
        w = np.ones(logits.shape[:2], logits.dtype)
        v = np.full(logits.shape[:2], a, logits.dtype)
        for k, m in enumerate(who):
            if m != PILOT:
                e, g = raw(block.index, len(block), m)
                w[:, k] = e / tot[m]
                v[:, k] = g / tot[m]
        p0 = softmax(block.z).astype(logits.dtype)
        row = np.arange(len(block))
        own = logits[row, :, block.y]
        soft = np.einsum("nsc,nc->ns", logits, p0)
        peak, total = normalise(logits)
        lost = ((w * (total + (peak - own))) + (v * (total + (peak - soft)))).sum(
            0, dtype=np.float64
        )
        logits *= (w + v)[:, :, None]
        logits[row, :, block.y] -= w
        logits -= v[:, :, None] * p0[:, None]
        return lost, logits

    return members.fit_members("nptl", rows, head, loss, 1.0 + a, settings)
