from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.methods.heads import members
from posthoc.methods.heads.blocks import stream
from posthoc.methods.heads.losses import log_loss, normalise


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    members: int = Field(default=20, ge=2)
    iterations: int = Field(default=30, ge=1)
    seed: int = 0
    prior_precision: float | None = Field(default=None, gt=0)
    mixup_alpha: float = 1.0
    mixup_weight: float = 1.0
    mixup_share: float = 1.0


def fit(rows, head, task, st):
    def pairs(index, size, m):
        rng = stream(st.seed, 2, index, m + 1)
        left = st.mixup_share
        while left > 0:
            k = max(1, round(min(left, 1) * size))
            left -= 1
            yield (
                rng.permutation(size)[:k],
                rng.permutation(size)[:k],
                rng.beta(st.mixup_alpha, st.mixup_alpha, k),
            )

    def loss(block, logits, who):
        n = len(block)
        slope = np.zeros_like(logits)
        value = np.zeros(len(who))
        for k, m in enumerate(who):
            L = logits[:, k]
            for i, j, t in pairs(block.index, n, m):
                t = t[:, None].astype(L.dtype)
                mixed = t * L[i] + (1 - t) * L[j]
                row = np.arange(len(i))
                yi, yj = block.y[i], block.y[j]
                own = t[:, 0] * mixed[row, yi] + (1 - t[:, 0]) * mixed[row, yj]
                p = mixed[:, None]
                peak, total = normalise(p)
                p = p[:, 0]
                value[k] += st.mixup_weight * (total[:, 0] + (peak[:, 0] - own)).sum(
                    dtype=np.float64
                )
                p[row, yi] -= t[:, 0]
                p[row, yj] -= 1 - t[:, 0]
                p *= st.mixup_weight
                slope[i, k] += t * p
                slope[j, k] += (1 - t) * p
        w = np.ones(logits.shape[:2], logits.dtype)
        v, r = log_loss(logits, block.y, w)
        r += slope
        return value + v, r

    return members.fit_members("mixup", rows, head, loss, 1 + st.mixup_weight * st.mixup_share, st)
