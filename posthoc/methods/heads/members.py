"""What ensembles of refitted heads share: fit of a classification, state, spread and fragment.

A member is its difference from the frozen head; so is what is stored and served. Cost of a row at
inference: D·S·C multiplications, for S members of C classes over D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import F64, Array, FitError, LinearHead, State
from posthoc.links import Spread, SpreadNames
from posthoc.methods.heads import curvature, lbfgs
from posthoc.methods.heads.blocks import measure
from posthoc.methods.heads.losses import Loss, Penalised
from posthoc.methods.heads.weights import PILOT
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

LIMIT = 200_000_000  # numbers of all members together: 800 MB in the graph, which holds 2 GB
MEMORY = 3 << 28  # bytes for the members fitted at one time, which keeps a fit below 1 GB
ARRAYS = 2 * lbfgs.MEMORY + 12  # of the size of a member that a fit holds for it
PILOT_STEPS = 30
TOLERANCE = 1e-8  # nats a row by which a member's loss may lie above its minimum


class Refit(BaseModel):
    """The settings of every page of heads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    members: int = Field(default=20, ge=2)
    prior_precision: float | None = Field(default=None, gt=0)
    iterations: int = Field(default=50, ge=1)
    seed: int = Field(default=0, ge=0)


def check_size(name: str, head: LinearHead, members: int) -> None:
    """FitError where the members are more numbers than a graph should hold."""
    c, d = head.weight.shape
    if (numbers := members * c * (d + 1)) > LIMIT:
        raise FitError(
            f"{name}: {members} heads of {c} outputs over {d} features are {numbers:,} weights, "
            f"above the limit of {LIMIT:,}; ask for fewer with --set members="
            f"{max(2, LIMIT // (c * (d + 1)))}"
        )


def fit_classes(
    name: str, rows: Rows, head: LinearHead, loss: Loss, mass: float, settings: Refit
) -> State:
    """Refit the head once a member, each with its own ``loss``, whose rows weigh ``mass`` on
    average.

    A pilot, the member with mean weights, is fitted first: the others start from it, in
    coordinates measured there. Members are fitted in groups that keep within MEMORY. The state's
    settings say how many ``converged`` and the ``largest_gradient``, half whose square is about
    the nats by which that member's loss lies above its minimum.
    """
    check_size(name, head, settings.members)
    (dtype, centre), tolerance = measure(rows), TOLERANCE * rows.n * mass
    c, d = head.weight.shape
    precision = settings.prior_precision or curvature.evidence(rows, head, dtype)
    pilot = lbfgs.minimise(
        Penalised(rows, (d + 1, c), loss, precision, PILOT),
        np.zeros((1, (d + 1) * c), dtype),
        curvature.Plain(),
        steps=PILOT_STEPS,
        tolerance=tolerance,
    ).x
    coordinates = curvature.around(rows, pilot[0], c, precision, mass)
    group = max(1, MEMORY // (ARRAYS * pilot.nbytes))
    weight = np.empty((d + 1, settings.members, c), np.float32)
    steps, converged, gradient = 0, 0, 0.0
    for first in range(0, settings.members, group):
        some = min(group, settings.members - first)
        found = lbfgs.minimise(
            Penalised(rows, (d + 1, c), loss, precision, first),
            np.repeat(pilot, some, 0),
            coordinates,
            steps=settings.iterations,
            tolerance=tolerance,
        )
        heads = _about(found.x.reshape(some, d + 1, c), centre)
        weight[:, first : first + some] = (heads - heads.mean(2, keepdims=True)).swapaxes(0, 1)
        steps = max(steps, found.steps)
        converged += int(found.converged.sum())
        gradient = max(gradient, float(found.gradient.max()))
    said = {
        **settings.model_dump(),
        "task": "classification",
        "prior_precision": precision,
        "rows": rows.n,
        "steps": steps,
        "converged": converged,
        "largest_gradient": gradient,
    }
    return State({"centre": centre, "weight": weight[:-1], "bias": weight[-1]}, said)


def values_state(heads: F64, centre: F64, said: dict[str, object]) -> State:
    """The state of a regression from members S×(D+1)×K: their mean, and what they differ from it
    over the root of S - 1, so that squares sum to the variance."""
    heads = _about(heads, centre)
    mean = heads.mean(0)
    apart = (heads - mean) / np.sqrt(len(heads) - 1)
    weight = np.ascontiguousarray(apart.swapaxes(0, 1).astype(np.float32))
    return State(
        {
            "centre": centre,
            "weight": weight[:-1],
            "bias": weight[-1],
            "mean_weight": mean[:-1].astype(np.float32),
            "mean_bias": mean[-1].astype(np.float32),
        },
        said,
    )


def _about(heads: Array, centre: F64) -> Array:
    """The same S×(D+1)×C for features less their ``centre``, in which float32 rounds least."""
    return np.concatenate([heads[:, :-1], heads[:, -1:] + (centre @ heads[:, :-1])[:, None]], 1)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the members add to the outputs of N rows (float64 definition): a mixture of their
    deviations, or in a regression the Gaussian with the members' mean and variance."""
    t = {k: v.astype(np.float64) for k, v in state.tensors.items()}
    features = np.asarray(phi, np.float64) - t["centre"]
    d, s, c = t["weight"].shape
    draws = (features @ t["weight"].reshape(d, s * c)).reshape(-1, s, c) + t["bias"]
    if state.settings["task"] == "classification":
        return Spread(None, draws=draws)
    variance = (draws**2).sum(1)
    shift = features @ t["mean_weight"] + t["mean_bias"]
    return Spread(variance, np.sqrt(variance), np.eye(c), shift=shift)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment: one product with all members."""
    t = state.tensors
    d, s, c = t["weight"].shape
    phi = g.op("Sub", phi, g.const(t["centre"]))
    flat = g.op("Gemm", phi, g.const(t["weight"].reshape(d, s * c)), g.const(t["bias"].ravel()))
    draws = g.op("Reshape", flat, g.const([0, s, c], "int64"))
    if state.settings["task"] == "classification":
        return SpreadNames(None, draws=draws)
    variance = g.sum(g.op("Mul", draws, draws), 1)
    shift = g.op("Gemm", phi, g.const(t["mean_weight"]), g.const(t["mean_bias"]))
    return SpreadNames(variance, g.op("Sqrt", variance), np.eye(c), shift=shift)
