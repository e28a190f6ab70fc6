"""What all ensembles of heads share: their fit, their state, their spread and its fragment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc.contract import Array, FitError, LinearHead, State
from posthoc.links import Spread
from posthoc.methods.heads import curvature, lbfgs
from posthoc.methods.heads.blocks import PILOT, precision_of
from posthoc.methods.heads.losses import Loss, Penalised
from posthoc.rows import Rows

if TYPE_CHECKING:
    pass

LIMIT = 200_000_000
MEMORY = 1 << 30
ARRAYS = 2 * lbfgs.MEMORY + 10
PILOT_STEPS = 30
TOLERANCE = 1e-8


def fit_members(
    name: str, rows: Rows, head: LinearHead, loss: Loss, mass: float, settings: Any
) -> State:
    c, d = head.weight.shape
    check_size(name, settings.members, c, d)
    dtype = precision_of(rows)
    precision = settings.prior_precision or curvature.evidence(rows, head)
    shape, p = (d + 1, c), (d + 1) * c
    pilot = lbfgs.minimise(
        Penalised(rows, shape, loss, precision, first=PILOT),
        np.zeros((1, p), dtype),
        curvature.Plain(),
        iterations=PILOT_STEPS,
        tolerance=TOLERANCE,
    )
    coordinates = curvature.around(rows, pilot.x[0], c, precision, mass)
    group = max(1, MEMORY // (ARRAYS * p * dtype.itemsize))
    found = []
    for first in range(0, settings.members, group):
        some = min(group, settings.members - first)
        found.append(
            lbfgs.minimise(
                Penalised(rows, shape, loss, precision, first=first),
                np.repeat(pilot.x, some, 0),
                coordinates,
                iterations=settings.iterations,
                tolerance=TOLERANCE,
            )
        )
    x = np.concatenate([f.x for f in found]).reshape(-1, d + 1, c).astype(np.float64)
    x -= x.mean(2, keepdims=True)
    said = {
        "task": "classification",
        "prior_precision": precision,
        "members": settings.members,
        "converged": int(sum(f.converged.sum() for f in found)),
        "largest_gradient": float(max(f.gradient.max() for f in found)),
        "steps": max(f.iterations for f in found),
        "rows": rows.n,
    }
    x = x.transpose(1, 0, 2).astype(np.float32)
    return State(
        {"weight": np.ascontiguousarray(x[:-1]), "bias": np.ascontiguousarray(x[-1])}, said
    )


def check_size(name: str, members: int, outputs: int, features: int) -> None:
    if (numbers := members * outputs * (features + 1)) > LIMIT:
        raise FitError(
            f"{name}: {members} members of {outputs} outputs by {features} features are "
            f"{numbers:,} weights, above the limit of {LIMIT:,}; ask for fewer members"
        )


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    w, b = state.tensors["weight"].astype(np.float64), state.tensors["bias"].astype(np.float64)
    phi = np.asarray(phi, np.float64)
    draws = np.einsum("nd,dsc->nsc", phi, w, optimize=True) + b
    return Spread(None, draws=draws)
