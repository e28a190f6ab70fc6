"""The options of ``vbll``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from posthoc.methods.vbll.bound import Bound
from posthoc.methods.vbll.covariance import Kind
from posthoc.methods.vbll.training import Objective

CLASSIFIER_ONLY = {"bound", "epochs", "learning_rate", "batch_size", "seed"}


class Settings(BaseModel):
    """Options of both tasks:

    ``covariance`` of each output's weights: diagonal, lowrank (diagonal plus ``rank`` directions)
    or dense; None is diagonal for a classifier and dense, which is exact, for a regression.
    ``prior_scale`` is the prior variance of an output's deviation at a typical row, in squared
    units of the output; None learns it in closed form, and towards 0 the frozen head is left.
    ``objective`` elbo, or de_elbo, which counts the data weights / rows times where there are more
    weights than rows; None is de_elbo for a classifier and elbo for a regression.

    A classifier's alone: ``bound`` of the expected log softmax, tilted (Knowles & Minka) or
    jensen (the paper's; it is far looser with many features); ``epochs``, by default as many as
    make 600 steps of Adam and at least 10; ``learning_rate`` at the start, for standardised
    features; ``batch_size``; ``seed`` of their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    covariance: Kind | None = None
    rank: int = Field(default=3, ge=1)
    prior_scale: float | None = Field(default=None, gt=0)
    objective: Objective | None = None
    bound: Bound = "tilted"
    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=0.01, gt=0, le=1)
    batch_size: int = Field(default=128, ge=1)
    seed: int = Field(default=0, ge=0)
