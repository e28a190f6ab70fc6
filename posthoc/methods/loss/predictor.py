"""Loss prediction: a small detached network says how large the loss of a row will be.

u(x) is trained to rank the losses of the frozen model (Yoo & Kweon 2019, arXiv:1905.03677;
Kirchhof et al. 2024, arXiv:2402.16569) from the cached features, if there are any, and from the
outputs. It predicts the expected loss on rows like those it was fitted on, noise and model error
alike, and says nothing of how strange a row is.

Classification: of the log loss l the confidence of the row already expects its entropy H, at the
temperature T that fits held-out rows, and to rank l would be to rank H. What is ranked is the
excess l - H, and it is served as a widening: log v = a u + b m + constant, m the log-odds of the
predicted class, with a >= 0 and b of the largest likelihood of softmax(z / (T sqrt(v))) on
held-out rows. A row whose loss is larger than its confidence admits is flattened, one whose loss
is smaller sharpened. Regression: the squared error of each output is ranked, and exp(a u +
constant) times the mean squared error is the predicted squared error v. The strength that is
fitted later mixes v with a constant, and 0 is temperature scaling. The objective ``likelihood``
has no u: it trains log v by that likelihood.

Outside the range of its rows a network may say anything. log v is kept inside the range that it
had on held-out rows, and while a row's largest standardised input grows from R to 1.5 R (R: what
999 of 1000 held-out rows stay below) it is raised to the average at least.

Memory of a fit is one block of rows and the held-out ones, some 5,000 at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.folds import log_softmax
from posthoc.links import Spread, SpreadNames, entropy
from posthoc.methods.loss import objective
from posthoc.methods.loss.inputs import Inputs, measure
from posthoc.methods.loss.perceptron import forward
from posthoc.methods.loss.training import Batch, Objective, Recipe, fit_map, recut, train
from posthoc.methods.temperature import fit_temperature
from posthoc.rows import HELD_OUT, Rows

INFO = Info(
    name="loss",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"labels"}),
    summary="a small network that predicts expected loss: noise and model error on rows like those "
    "of the fit, not strangeness",
    paper=Paper("Pretrained Visual Uncertainties", 2024, "https://arxiv.org/abs/2402.16569"),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


class Settings(BaseModel):
    """``objective`` ranking or likelihood; ``top`` the number of largest logits that it sees;
    ``width`` and ``layers`` of the network; ``gap`` of the ranking loss; ``learning_rate``,
    ``weight_decay`` and ``batch_size`` of AdamW, at most ``steps`` steps, stopped after
    ``patience`` looks at held-out rows without a better one; ``seed`` of the first weights and of
    the order of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    objective: Literal["ranking", "likelihood"] = "ranking"
    top: int = Field(default=10, ge=2)
    width: int = Field(default=128, ge=1)
    layers: int = Field(default=1, ge=1, le=2)
    gap: float = Field(default=0.1, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    batch_size: int = Field(default=256, ge=2)
    steps: int = Field(default=5000, ge=1)
    patience: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)


FEWEST = 20  # rows
HELD_MOST = 5000  # rows held out; memory stays bounded
LEAST_SHARE = 1000  # and at least one row in so many is held out
LARGEST = 25.0  # mean squared errors that one squared error may count
BEYOND = 0.999  # of held-out rows stay below R


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """Train on four rows of five, the fifth (at most some 5,000 rows) says when to stop and what u
    means.

    Raises FitError for fewer than 20 rows and for labels that a regressor predicts without error.
    """
    del head
    if rows.n < FEWEST:
        raise FitError(f"loss needs at least {FEWEST} rows and has {rows.n}")
    kept, held = recut(rows).hold_out(min(max(HELD_OUT, rows.n // HELD_MOST), LEAST_SHARE))
    inputs = measure(kept, task, settings.top)
    unit = _mean_square(rows) if task == "regression" else np.ones(1)
    t = fit_temperature(held.z, np.asarray(held.y)) if task == "classification" else 1.0

    def batch(block: Features) -> Batch:
        return inputs(block.phi, block.z)[0].astype(np.float32), target(block)

    def target(block: Features) -> Any:
        if task == "classification" and settings.objective == "likelihood":
            return np.asarray(block.z, np.float64) / t, np.asarray(block.y, np.int64)
        return _losses(block, task, t, unit)

    parameters, steps, value = train(
        kept,
        [batch(b) for b in blocks_of.of(held, settings.batch_size)],
        batch,
        _objective(task, settings),
        Recipe(
            sizes=(len(inputs.mean), *(settings.width,) * settings.layers, len(unit)),
            **settings.model_dump(exclude={"objective", "top", "width", "layers", "gap"}),
        ),
    )
    x, away = inputs(held.phi, held.z)
    u = forward([np.asarray(p, np.float64) for p in parameters], x)[-1]
    slope, odds, offset = np.ones(len(unit)), 0.0, np.zeros(len(unit))
    if settings.objective == "ranking":
        slope, odds, offset = _map(u, x[:, -1], held, task, t, unit)
    h = u * slope + odds * x[:, -1:] + offset
    if task == "classification":  # one on the average: its scale is the strength's
        middle = np.log(np.exp(h).mean(0))
        offset, h = offset - middle, h - middle
    parameters[-2] = parameters[-2] * slope
    parameters[-1] = parameters[-1] * slope + offset
    said: dict[str, Any] = {
        "task": task,
        **settings.model_dump(),
        "top": inputs.top,
        "features": inputs.features,
        "rows": rows.n,
        "held_out_rows": len(held),
        "held_out_objective": value,
        "steps_taken": steps,
    }
    if settings.objective == "ranking":
        said["held_out_rank_correlation"] = _rank_correlation(u, _losses(held, task, t, unit))
    if task == "regression":
        said["noise_variance"] = [float(v) for v in unit]
    else:
        said["temperature"] = t
    tensors: dict[str, Array] = {
        "mean": inputs.mean,
        "scale": inputs.scale,
        "odds": np.asarray([odds]),
        "low": h.min(0),
        "high": h.max(0),
        "reach": np.asarray([float(np.quantile(away, BEYOND)) or 1.0]),
        "unit": unit,
        **{f"layer{i}": np.asarray(p, np.float32) for i, p in enumerate(parameters)},
    }
    return State(tensors, said)


def spread(state: State, phi: Array | None, z: Array) -> Spread:
    """The widening of N rows, N (classification) or N×K (float64 definition)."""
    t = state.tensors
    x, away = _inputs(state)(phi, z)
    h = forward([np.asarray(p, np.float64) for p in _layers(state)], x)[-1]
    h = np.clip(h + t["odds"] * x[:, -1:], t["low"], t["high"])
    rise, begin = _floor(state)
    v = np.exp(np.maximum(h, np.minimum(away * rise + begin, 0.0))) * t["unit"]
    return Spread(v[:, 0] if state.settings["task"] == "classification" else v)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    x, away = _inputs(state).emit(g, phi, z)
    h, layers = x, _layers(state)
    for i in range(0, len(layers), 2):
        h = g.op("Gemm", g.op("Relu", h) if i else h, g.const(layers[i]), g.const(layers[i + 1]))
    if t["odds"][0]:
        m = g.op("Gather", x, g.const([len(t["mean"]) - 1], "int64"), axis=1)
        h = g.op("Add", h, g.op("Mul", m, g.const(t["odds"])))
    h = g.op("Max", g.op("Min", h, g.const(t["high"])), g.const(t["low"]))
    rise, begin = _floor(state)
    floor = g.op("Add", g.op("Mul", away, g.const(rise)), g.const(begin))
    h = g.op("Max", h, g.op("Min", floor, g.const(0.0)))
    return SpreadNames(g.op("Mul", g.op("Exp", h), g.const(t["unit"])))


def _inputs(state: State) -> Inputs:
    t, said = state.tensors, state.settings
    return Inputs(said["task"], said["top"], said["features"], t["mean"], t["scale"])


def _layers(state: State) -> list[Array]:
    return [state.tensors[f"layer{i}"] for i in range(2 * state.settings["layers"] + 2)]


def _floor(state: State) -> tuple[F64, F64]:
    """log v is at least min(0, away * rise + begin): its lowest at R, the average at 1.5 R."""
    depth = np.maximum(-state.tensors["low"], 0.0)
    return 2.0 * depth / state.tensors["reach"], -3.0 * depth


def _objective(task: Task, settings: Settings) -> Objective:
    if settings.objective == "ranking":
        return lambda u, loss: objective.ranking(u, loss, settings.gap)
    if task == "regression":
        return objective.gaussian
    return lambda h, target: objective.widened(h, *target)


def _losses(block: Features, task: Task, t: float, unit: F64) -> F64:
    """Log losses less the entropies, N×1 in nats, or squared errors, N×K in mean squared ones."""
    if task == "classification":
        log_p = log_softmax(np.asarray(block.z, np.float64) / t)
        own = np.take_along_axis(log_p, np.asarray(block.y, np.int64)[:, None], 1)
        return np.asarray(-own - entropy(log_p)[:, None])
    error = np.asarray(block.y, np.float64) - np.asarray(block.z, np.float64)
    return np.minimum(error**2 / unit, LARGEST)


def _mean_square(rows: Rows) -> F64:
    total = sum(((np.asarray(b.y, np.float64) - b.z) ** 2).sum(0) for b in rows)
    unit = np.asarray(total, np.float64) / rows.n
    if not np.all(unit > 0):
        raise FitError("loss: the model predicts the labels without error; check for leakage")
    return unit


def _map(
    u: F64, odds: F64, held: Features, task: Task, t: float, unit: F64
) -> tuple[F64, float, F64]:
    """(slope of u, slope of the log-odds, constant) of log v from held-out rows."""
    centre, size = u.mean(0), u.std(0)
    size = np.where(size > 0, size, 1.0)
    columns = (u - centre) / size
    if task == "classification":
        z, y = np.asarray(held.z, np.float64) / t, np.asarray(held.y, np.int64)

        def widened(h: F64) -> tuple[float, F64]:
            value, by_h = objective.widened(h[:, None], z, y)
            return value, by_h[:, 0]

        (a, b), constant = fit_map(np.stack([columns[:, 0], odds], 1), widened, signed=1)
        return np.asarray([a]) / size, float(b), constant - a * centre / size
    squared = _losses(held, task, t, unit)
    slope, offset = np.zeros(len(unit)), np.zeros(len(unit))
    for k in range(len(unit)):

        def normal(h: F64, k: int = k) -> tuple[float, F64]:
            return objective.gaussian(h, squared[:, k])

        (a,), constant = fit_map(columns[:, k : k + 1], normal, signed=1)
        slope[k], offset[k] = a / size[k], constant - a * centre[k] / size[k]
    return slope, 0.0, offset


def _rank_correlation(u: F64, loss: F64) -> float:
    """Spearman's, the mean over outputs; 0 for a constant u."""
    ranks = [np.argsort(np.argsort(v, axis=0), axis=0).astype(np.float64) for v in (u, loss)]
    found = [
        np.corrcoef(a, b)[0, 1] if v.std() > 0 else 0.0
        for a, b, v in zip(ranks[0].T, ranks[1].T, u.T, strict=True)
    ]
    return float(np.mean(found))
