"""What a module is, what a score is, and what a prediction holds.

Everything above this file agrees through it: the method pages and score pages implement the
functions named here, the fused graph emits the fields of a prediction, and the bundle stores the
state. Nothing here imports more than numpy and pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Task = Literal["classification", "regression"]
Array = NDArray[Any]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class HedgedError(Exception):
    """Something the user can mend. The message names the object and the fix."""


class DataError(HedgedError):
    """A table, a column or a row that cannot be used."""


class ModelError(HedgedError):
    """A frozen model that cannot be opened, exported or run."""


class BundleError(HedgedError):
    """A bundle that is damaged, altered, newer than this version, or incomplete."""


class FitError(HedgedError):
    """A fit that the given rows cannot support."""


class TensorSpec(BaseModel):
    """Name, numpy dtype name and shape of a tensor; -1 is any size and axis 0 is the batch."""

    model_config = ConfigDict(frozen=True)
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearHead:
    """The last linear layer: ``z = phi @ weight.T + bias``; weight C×D, bias C."""

    weight: F64
    bias: F64


@dataclass(frozen=True, slots=True)
class Features:
    """A block of cached rows: features N×D (None for a black box), outputs N×C, labels or None.

    Labels are class indices (N, int64) or regression targets (N×K, float64).
    """

    phi: Array | None
    z: Array
    y: Array | None = None

    def __len__(self) -> int:
        return int(self.z.shape[0])


@dataclass(frozen=True, slots=True)
class State:
    """A fitted module or score: named tensors for safetensors, settings as plain JSON."""

    tensors: dict[str, Array]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from."""

    title: str
    year: int
    url: str


@dataclass(frozen=True, slots=True)
class Info:
    """The claims of one registered module or score. The conformance suite tests each of them.

    ``needs`` is a subset of {"features", "linear_head", "labels", "network", "weight_samples"};
    ``passes`` counts passes of the frozen network per prediction; ``preserves`` says that the
    fitted head predicts what the frozen head predicts. ``either``: it does not, but its
    probabilities may stand beside the frozen label, which is kept unless the module's is asked
    for; in a regression the frozen mean stays.
    """

    name: str
    kind: Literal["module", "score"]
    tasks: tuple[Task, ...]
    needs: frozenset[str]
    summary: str
    paper: Paper
    passes: int = 1
    preserves: bool = True
    either: bool = False


def _out(dtype: str, axes: str) -> Any:
    """A prediction field: numpy dtype and its axes after the batch (C classes, K outputs, Q)."""
    return field(default=None, metadata={"dtype": dtype, "axes": axes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Prediction for N rows over C classes. A field that the bundle cannot give is None."""

    task: Literal["classification"] = "classification"
    label: Array = _out("int64", "")
    probs: Array = _out("float32", "C")
    confidence: Array = _out("float32", "")
    entropy: Array = _out("float32", "")
    aleatoric: Array | None = _out("float32", "")
    epistemic: Array | None = _out("float32", "")
    set: Array | None = _out("bool", "C")
    set_size: Array | None = _out("int64", "")
    ood_score: Array | None = _out("float32", "")
    ood_pvalue: Array | None = _out("float32", "")
    ood: Array | None = _out("bool", "")
    abstain: Array | None = _out("bool", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """Prediction for N rows and K outputs, in the units of the target; None where not given."""

    task: Literal["regression"] = "regression"
    mean: Array = _out("float32", "K")
    std: Array = _out("float32", "K")
    aleatoric_std: Array | None = _out("float32", "K")
    epistemic_std: Array | None = _out("float32", "K")
    lower: Array | None = _out("float32", "K")
    upper: Array | None = _out("float32", "K")
    quantiles: Array | None = _out("float32", "KQ")
    ood_score: Array | None = _out("float32", "")
    ood_pvalue: Array | None = _out("float32", "")
    ood: Array | None = _out("bool", "")
    abstain: Array | None = _out("bool", "")


Prediction = Classification | Regression
PREDICTIONS: dict[Task, type[Classification] | type[Regression]] = {
    "classification": Classification,
    "regression": Regression,
}


def output_fields(task: Task) -> dict[str, tuple[str, str]]:
    """Field name -> (numpy dtype, axes after the batch), in the order every front end uses."""
    return {
        f.name: (f.metadata["dtype"], f.metadata["axes"])
        for f in fields(PREDICTIONS[task])
        if f.metadata
    }
