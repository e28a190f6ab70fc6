from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.methods.heads import members
from posthoc.methods.heads.blocks import PILOT, sizes, stream
from posthoc.methods.heads.losses import log_loss


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    members: int = Field(default=20, ge=2)
    iterations: int = Field(default=30, ge=1)
    seed: int = 0
    prior_precision: float | None = Field(default=None, gt=0)


def fit(rows, head, task, settings):
    def raw(index, size, m):
        return stream(settings.seed, 0, index, m).standard_exponential(size)

    tot = (
        np.array(
            [sum(raw(i, s, m).sum() for i, s in sizes(rows.n)) for m in range(settings.members)]
        )
        / rows.n
    )

    def loss(block, logits, who):
        w = np.ones(logits.shape[:2], logits.dtype)
        for k, m in enumerate(who):
            if m != PILOT:
                w[:, k] = raw(block.index, len(block), m) / tot[m]
        return log_loss(logits, block.y, w)

    return members.fit_members("bootstrap", rows, head, loss, 1.0, settings)
