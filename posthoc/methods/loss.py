"""Loss prediction: a small detached network says how large the loss of a row will be.

u(x) is trained to rank the losses of the frozen model (Yoo & Kweon 2019, arXiv:1905.03677;
Kirchhof et al. 2024, arXiv:2402.16569) from the cached features, if there are any, and from the
outputs: in a classification the K largest logits less the largest and the log-odds of the
predicted class, in a regression the means. It is a prediction of expected loss on rows like those
it was fitted on, noise and model error alike, and says nothing of how strange a row is.

It is served as a widening. Classification: log v = a u + b m + constant, m the log-odds of the
predicted class, with a >= 0 and b of largest likelihood for softmax(z / (T sqrt(v))) on held-out
rows: a row whose predicted loss is larger than its own confidence admits is flattened, one whose
loss is smaller is sharpened. Regression: v = exp(a u + constant) times the mean squared error is
the predicted squared error. The strength that is fitted later mixes v with a constant, and 0 is
temperature scaling.

The objective ``likelihood`` trains log v itself by that likelihood, and has no u.

Outside the range of the rows it was fitted on a network says anything. log v is kept inside the
range it had on held-out rows, and as a row's largest standardised input grows from R to 1.5 R (R:
what 999 of 1000 held-out rows stay below) it is raised to the average at least.

Memory of a fit is one block of rows and the held-out fifth of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.folds import log_loss
from posthoc.links import Spread, SpreadNames
from posthoc.methods import loss_objective as objective
from posthoc.methods.perceptron import AdamW, backward, forward, start
from posthoc.methods.temperature import fit_temperature
from posthoc.rows import BLOCK, Rows, join, take

INFO = Info(
    name="loss",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"labels"}),
    summary="predicts the expected loss (noise and model error on rows like the fitted ones, not "
    "strangeness) with a small network; black boxes too",
    paper=Paper("Pretrained Visual Uncertainties", 2024, "https://arxiv.org/abs/2402.16569"),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


class Settings(BaseModel):
    """``objective`` ranking or likelihood; ``top`` the largest logits that it sees; ``width`` and
    ``layers`` of the network; ``gap`` of the ranking loss; ``learning_rate``, ``weight_decay`` and
    ``batch_size`` of AdamW, for at most ``steps`` steps, stopped after ``patience`` looks at
    held-out rows without a better one; ``seed`` of the first weights and the order of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    objective: Literal["ranking", "likelihood"] = "ranking"
    top: int = Field(default=10, ge=2)
    width: int = Field(default=128, ge=1)
    layers: int = Field(default=1, ge=1, le=2)
    gap: float = Field(default=objective.GAP, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    batch_size: int = Field(default=256, ge=2)
    steps: int = Field(default=5000, ge=1)
    patience: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)


FEWEST = 20  # rows
LONGEST = 200  # steps between two looks at the held-out rows
REACH = 10.0  # standard deviations that an input may count
LARGEST = 25.0  # mean squared errors that a squared error may count
PRIOR = 2.0  # of the map from u: the precision of its coefficients, as many times 1 / rows
Batch = tuple[Array, Any]  # inputs, and what the objective compares with
Objective = Callable[[Array, Any], tuple[float, F64]]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the network sees of a row, standardised; ``scale`` 0 for a constant one."""

    task: Task
    top: int
    mean: F64
    scale: F64

    def __call__(self, phi: Array | None, z: Array) -> F64:
        return np.asarray((_raw(self.task, self.top, phi, z) - self.mean) * self.scale)


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """Train on four rows of five and stop, and fit the map from u, on the fifth.

    Raises FitError for fewer than 20 rows and for labels that a regressor predicts without error.
    """
    del head
    if rows.n < FEWEST:
        raise FitError(f"loss needs at least {FEWEST} rows and has {rows.n}")
    kept, held = _recut(rows).hold_out()
    inputs, unit = _scales(kept, held, task, settings.top)
    t = fit_temperature(held.z, np.asarray(held.y)) if task == "classification" else 1.0

    def batch(block: Features) -> Batch:
        x = np.clip(inputs(block.phi, block.z), -REACH, REACH).astype(np.float32)
        return x, _target(block, task, settings, t, unit)

    x, target = batch(held)
    compare = _objective(task, settings)
    parameters, steps, value = _train(
        kept, [batch(b) for b in _pieces(held, settings.batch_size)], batch, compare, settings
    )
    u = np.asarray(forward(parameters, x)[-1], np.float64)
    slope, odds, offset = np.ones(len(unit)), 0.0, np.zeros(len(unit))
    if settings.objective == "ranking":
        slope, odds, offset = _map(u, x, target, held, t)
    h = u * slope + odds * x[:, -1:] + offset
    if task == "classification":  # the scale of v is the strength's: one on the average
        offset = offset - np.log(np.exp(h).mean(0))
        h = h - np.log(np.exp(h).mean(0))
    away = np.abs(inputs(held.phi, held.z)).max(1)
    last = {"weight": parameters[-2] * slope, "bias": parameters[-1] * slope + offset}
    layers = [*parameters[:-2], last["weight"], last["bias"]]
    tensors: dict[str, Array] = {
        "mean": inputs.mean,
        "scale": inputs.scale,
        "odds": np.asarray([odds]),
        "low": h.min(0),
        "high": h.max(0),
        "reach": np.asarray([float(np.quantile(away, 0.999)) or 1.0]),
        "unit": unit,
        **{f"layer{i}": np.asarray(p, np.float32) for i, p in enumerate(layers)},
    }
    said: dict[str, Any] = {
        "task": task,
        "objective": settings.objective,
        "top": settings.top,
        "features": held.phi is not None,
        "layers": settings.layers,
        "rows": rows.n,
        "held_out_rows": len(held),
        "steps": steps,
        "held_out_objective": value,
        "rank_correlation": _rank_correlation(u, _losses(held, task, t, unit)),
    }
    if task == "regression":
        said["noise_variance"] = [float(v) for v in unit]
    else:
        said["temperature"] = t
    return State(tensors, said)


def spread(state: State, phi: Array | None, z: Array) -> Spread:
    """The widening of N rows, N (classification) or N×K (float64 definition)."""
    t, said = state.tensors, state.settings
    seen = phi if said["features"] else None
    x = _Inputs(said["task"], said["top"], t["mean"], t["scale"])(seen, z)
    away = np.abs(x).max(1, keepdims=True)
    x = np.clip(x, -REACH, REACH)
    h = forward([np.asarray(p, np.float64) for p in _layers(state)], x)[-1]
    if said["task"] == "classification":
        h = h + t["odds"] * x[:, -1:]
    rise, start_at = _floor(state)
    h = np.maximum(np.clip(h, t["low"], t["high"]), np.minimum(away * rise + start_at, 0.0))
    v = np.exp(h) * t["unit"]
    return Spread(v[:, 0] if said["task"] == "classification" else v)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t, said = state.tensors, state.settings
    parts = [phi] if said["features"] and phi is not None else []
    parts += _emit_outputs(g, z, len(t["mean"]), said)
    raw = g.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    x = g.op("Mul", g.op("Sub", raw, g.const(t["mean"])), g.const(t["scale"]))
    away = g.reduce("ReduceMax", g.op("Abs", x), 1, keepdims=True)
    x = g.op("Clip", x, g.const(-REACH), g.const(REACH))
    h, layers = x, _layers(state)
    for i in range(0, len(layers), 2):
        h = g.op("Gemm", h, g.const(layers[i]), g.const(layers[i + 1]))
        if i + 2 < len(layers):
            h = g.op("Relu", h)
    if said["task"] == "classification":
        m = g.op("Gather", x, g.const([len(t["mean"]) - 1], "int64"), axis=1)
        h = g.op("Add", h, g.op("Mul", m, g.const(t["odds"])))
    h = g.op("Max", g.op("Min", h, g.const(t["high"])), g.const(t["low"]))
    rise, start_at = _floor(state)
    floor = g.op("Add", g.op("Mul", away, g.const(rise)), g.const(start_at))
    h = g.op("Max", h, g.op("Min", floor, g.const(0.0)))
    return SpreadNames(g.op("Mul", g.op("Exp", h), g.const(t["unit"])))


def _layers(state: State) -> list[Array]:
    return [state.tensors[f"layer{i}"] for i in range(2 * state.settings["layers"] + 2)]


def _floor(state: State) -> tuple[F64, F64]:
    """log v is at least min(0, away * rise + start): its lowest at R, the average at 1.5 R."""
    depth = np.maximum(-state.tensors["low"], 0.0)
    return 2.0 * depth / state.tensors["reach"], -3.0 * depth


def _raw(task: Task, top: int, phi: Array | None, z: Array) -> F64:
    """Inputs N×J, not standardised; in a classification the log-odds come last."""
    z = np.asarray(z, np.float64)
    seen = [] if phi is None else [np.asarray(phi, np.float64)]
    if task == "regression":
        return np.concatenate([*seen, z], 1)
    k = min(top, z.shape[1])
    largest = np.sort(np.partition(z, -k, axis=1)[:, -k:], axis=1)[:, ::-1]
    behind = largest[:, 1:] - largest[:, :1]
    peak = behind[:, :1]
    odds = -(peak + np.log(np.exp(behind - peak).sum(1, keepdims=True)))
    return np.concatenate([*seen, behind, odds], 1)


def _emit_outputs(g: Fragment, z: str, inputs: int, said: dict[str, Any]) -> list[str]:
    """The inputs that come of z."""
    del inputs
    if said["task"] == "regression":
        return [z]
    k = said["largest"]
    values, _ = g.op2("TopK", z, g.const([k], "int64"), axis=1)
    first = g.op("Gather", values, g.const([0], "int64"), axis=1)
    others = g.op("Gather", values, g.const(range(1, k), "int64"), axis=1)
    behind = g.op("Sub", others, first)
    peak = g.reduce("ReduceMax", behind, 1, keepdims=True)
    rest = g.sum(g.op("Exp", g.op("Sub", behind, peak)), 1, keepdims=True)
    return [behind, g.op("Neg", g.op("Add", peak, g.op("Log", rest)))]
