"""What the user of a Laplace page may choose."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from posthoc.contract import FitError, Task

Rule = Literal["evidence", "heldout", "epsilon"]


class Prior(BaseModel):
    """How the precision of the prior is found: ``prior_precision`` is given, or found by the rule
    ``prior``; ``epsilon`` belongs to the rule of that name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prior_precision: float | None = Field(default=None, gt=0)
    prior: Rule = "evidence"
    epsilon: float = Field(default=0.01, ge=1e-9, lt=1)

    # Validators of a field run only where it is given, so that nothing given is ever ignored.
    @field_validator("prior")
    @classmethod
    def _one_way(cls, value: Rule, info: ValidationInfo) -> Rule:
        if info.data.get("prior_precision") is not None:
            raise ValueError("prior_precision is given; leave the rule out")
        return value

    @field_validator("epsilon")
    @classmethod
    def _of_its_rule(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("prior_precision") is not None or info.data.get("prior") != "epsilon":
            raise ValueError("it belongs to prior=epsilon")
        return value

    @property
    def needs_held_out(self) -> bool:
        """Whether the rule wants rows that the posterior has not seen."""
        return self.prior_precision is None and self.prior != "evidence"

    def given(self, precision: float) -> Self:
        """The same with the precision found."""
        return self.model_copy(update={"prior_precision": precision})

    @property
    def rule(self) -> str:
        """What the state says of it: the rule, or that the precision was given."""
        return "given" if self.prior_precision is not None else self.prior


class Curvature(Prior):
    """``fisher``: the curvature is the generalised Gauss-Newton matrix (ggn, needs no labels) or
    the empirical Fisher matrix (empirical, classification with labels).

    ``prior_precision`` fixes the precision of the prior; else the rule ``prior`` finds it:
    evidence (MacKay's fixed point on the spectrum), heldout (the smallest precision within 0.0005
    nats of the best negative log-likelihood of the probit predictive on every fifth row, each
    precision with its own temperature), or epsilon, which needs no labels: the smallest precision
    at which that predictive differs from the frozen model's by at most ``epsilon`` in mean total
    variation (of such rows again; uncalibrated).

    ``train_rows`` rescales the curvature to the rows the network was trained on. ``fold_bias``
    treats the bias as the weight of a constant feature and centres logits over classes; False is
    laplace-torch's form: uncentred, and with kron curvature a block of its own for the bias."""

    fisher: Literal["ggn", "empirical"] = "ggn"
    train_rows: int | None = Field(default=None, gt=0)
    fold_bias: bool = True

    def check(self, task: Task) -> None:
        """FitError for the empirical Fisher matrix of a regression."""
        if task == "regression" and self.fisher == "empirical":
            raise FitError(
                "fisher=empirical is for classification; in a regression ggn is the exact curvature"
            )

    def scale(self, rows: int) -> float:
        """The factor on the curvature of so many rows."""
        return 1.0 if self.train_rows is None else self.train_rows / rows

    def described(self, rows: int) -> dict[str, Any]:
        """What the state says of the curvature of so many rows."""
        return {
            "rows": rows,
            "curvature_rows": self.train_rows or rows,
            "fold_bias": self.fold_bias,
            "fisher": self.fisher,
        }
