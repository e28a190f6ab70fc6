"""Sampled weights of a whole torch network: fit them on module rows, export all of them at once.

The posterior is laplace-torch's (`posthoc.laplace_torch`); what comes back is a frozen model like
any other, whose features are the outputs of its sampled copies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict, Field

from calibration.network import module_rows
from calibration.scaling import student_nll
from posthoc.contract import Array, ModelError, Task
from posthoc.export import export_torch
from posthoc.folds import log_loss_of_probs
from posthoc.frozen import Frozen, open_frozen
from posthoc.laplace_torch import Sampled, Which, sample_weights
from posthoc.model.samples import Samples
from posthoc.opening import Source


class Sampling(BaseModel):
    """``weights`` all or subnetwork; ``samples`` S; ``curvature`` kron, diag or full (default: kron
    for all, full for a subnetwork); at most ``rows`` module rows are fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: Which
    samples: int = Field(default=10, ge=2)
    curvature: Literal["kron", "diag", "full"] | None = None
    rows: int = Field(default=10_000, gt=0)


def sampled_model(
    source: Source,
    frozen: Frozen,
    samples: Samples,
    sampling: Sampling,
    *,
    task: Task,
    classes: tuple[str, ...] | None,
    fractions: Mapping[str, float],
    seed: int,
) -> tuple[Frozen, Sampled]:
    """The frozen model with its S sampled copies beside it, and the posterior they came from.

    ``frozen`` is ``source`` opened as it is; the rows are those that the split of ``seed`` makes
    module rows. Raises ModelError for a source that is not ``module:factory``, for several inputs
    and for a preprocessing graph, and whatever `posthoc.laplace_torch.sample_weights` raises.
    """
    if source.preprocess is not None:
        raise ModelError("--weights and --preprocess do not go together; put it into the module")
    if len(frozen.inputs) != 1:
        raise ModelError(f"--weights takes a module of one input; this has {len(frozen.inputs)}")
    if task == "classification" and frozen.z_dim == 1:
        raise ModelError("--weights takes a classifier of two logits or more; this one has one")
    module = _module(source)
    rows = module_rows(frozen, samples, sampling.rows, task, classes, fractions, seed)
    assert rows.y is not None
    x, y = rows.inputs[frozen.inputs[0].name], rows.y
    made = sample_weights(
        module,
        x,
        y,
        task=task,
        weights=sampling.weights,
        samples=sampling.samples,
        curvature=sampling.curvature,
        seed=seed,
    )
    name = frozen.inputs[0].name
    exported = export_torch(made.module, (x[:4],), input_names=[name], rows=(x[:64],))
    proto = onnx.load_from_string(exported.model)
    z, members = (o.name for o in proto.graph.output)
    opened = open_frozen(exported.model, task=task, output=z)
    if opened.z_is_probs:
        raise ModelError("the module gives probabilities; --weights needs one that gives logits")
    del proto.graph.output[1]
    both = dataclasses.replace(
        opened,
        model=proto.SerializeToString(),
        file=frozen.file,
        outputs=opened.outputs[:1],
        z=z,
        phi=members,
        phi_dim=sampling.samples * opened.z_dim,
        head=None,
        head_node=None,
        notes=(*frozen.notes, _note(made.facts)),
        sources=frozen.sources,
    )
    return both, made


def linearised(sampled: Sampled, x: Array, y: Array) -> dict[str, float]:
    """Rows and mean negative log-likelihood (nats) of laplace-torch's linearised predictive, at its
    own temperature of one: the figure to hold the served mixture against."""
    made = sampled.linearised(x)
    if made.ndim == 2:
        return {"rows": len(y), "nll": float(log_loss_of_probs(made, y).mean())}
    mean, variance = made
    error = np.asarray(y, np.float64).reshape(mean.shape) - mean
    return {"rows": len(y), "nll": float(student_nll(error, variance, math.inf).mean())}


def _module(source: Source) -> Any:
    """The torch module of ``module:factory``, its weights loaded."""
    from posthoc.model import torch_models

    spec = str(source.model or "columns of its outputs")
    if ":" not in spec or Path(spec).exists():
        raise ModelError(f"--weights needs a torch model as module:factory, not {spec}")
    with torch_models.working_directory():
        module = torch_models.make_module(spec)
        if source.checkpoint is not None:
            torch_models.load_weights(module, source.checkpoint)
    return module


def _note(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['samples']} sets of {facts['weights']} weights ({facts['parameters']:,}) drawn "
        f"from laplace-torch's {facts['curvature']} posterior on {facts['rows']:,} module rows"
    )
