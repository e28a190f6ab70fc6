"""Density of the direction of the features under a normalising flow (Real NVP, Dinh et al. 2017).

score = minus the logarithm, without its constant, of a density of the features at length one: a
flow along their 32 most variable directions (centred, at variance one) and, of what is left of
them, that of a Gaussian alike in all other directions (Tipping & Bishop 1999, "Probabilistic
principal component analysis"). Both parts are needed (`python -m bench ood`): strange rows often
leave the directions of the others altogether (Wang et al. 2022, arXiv:2203.10807), which a density
along them does not see, and often they are shorter and so nearer to the centre than any other row.

`posthoc.ood.coupling` has the layers. They begin as a Gaussian and stop at their best on a fifth of
the rows that they are not trained on, where they are never worse than it. The fit is a fold: the
rows are a `posthoc.ood.sample` of at most 20,000, and the flow is trained on them in their order
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import sample
from posthoc.ood.coupling import PARTS, Recipe, forward, train
from posthoc.ood.gaussian import ROUNDING, exact, real
from posthoc.ood.neighbours import LEAST, unit
from posthoc.ood.sample import Sample
from posthoc.rows import HELD_OUT

INFO = Info(
    name="flow",
    kind="score",
    tasks=("classification", "regression"),
    needs=frozenset({"features"}),
    summary="density of the normalised features under a flow (Real NVP)",
    paper=Paper("Density Estimation Using Real NVP", 2017, "https://arxiv.org/abs/1605.08803"),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
ROWS = 20_000
FEWEST = 20
DIRECTIONS = 32
ROWS_EACH = 10  # at least so many rows a direction
FLAT = 1e-6  # of the largest variance: a direction with less counts as one with so much
RECIPE = Recipe()


def init(n_classes: int, n_features: int) -> Sample:
    """No rows."""
    del n_classes, n_features
    return sample.empty(ROWS)


def update(stats: Sample, batch: Features) -> Sample:
    """Add the features of a batch; FitError for those that are not finite, or for none."""
    real(batch, INFO.name)
    return sample.add(stats, Features(batch.phi, np.zeros((len(batch), 0))), INFO.name)


def merge(a: Sample, b: Sample) -> Sample:
    """The sample of both."""
    return sample.join(a, b)


def finish(stats: Sample, head: LinearHead | None = None) -> State:
    """The directions and a flow over them.

    Raises FitError for fewer than 20 rows and for features that are constant over them.
    """
    del head
    if len(stats) < FEWEST:
        raise FitError(f"flow needs at least {FEWEST} rows and has {len(stats)}")
    x = unit(stats.phi)
    mean = exact(x.mean(0))
    away = x - mean
    values, vectors = np.linalg.eigh(away.T @ away / len(away))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    if values[0] <= ROUNDING:
        raise FitError("flow: the direction of the features is constant on the given rows")
    rank = int((values > FLAT * values[0]).sum())
    kept = min(DIRECTIONS, rank, max(1, len(x) // ROWS_EACH))
    rest = len(values) - kept
    floor = FLAT * float(values[0])
    tensors: dict[str, Array] = {
        "mean": mean,
        "basis": vectors[:, :kept],
        "scale": 1 / np.sqrt(values[:kept]),
        "rest": np.asarray(0.5 / max(float(values[kept:].mean()), floor) if rest else 0.0),
    }
    x = (away @ tensors["basis"] * tensors["scale"]).astype(np.float32)
    aside = sample.hashes(stats.phi) % np.uint64(HELD_OUT) == 0  # copies of a row on one side
    if not aside.any() or aside.all():
        aside = np.arange(len(x)) % HELD_OUT == 0
    layers, steps, value = train(x[~aside], x[aside], RECIPE)
    tensors |= {f"layer{i}": np.asarray(p, np.float64) for i, p in enumerate(layers)}
    return State(
        tensors,
        {
            "rows": stats.seen,
            "trained_on": int((~aside).sum()),
            "directions": kept,
            "explained": float(values[:kept].sum() / values.sum()),
            "steps": steps,
            "held_out_nats": value,
        },
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D, in nats (float64 definition)."""
    del z
    t = state.tensors
    away = unit(np.asarray(phi)) - t["mean"]
    along = away @ t["basis"]
    out, log = forward(_layers(state), along * t["scale"])
    left = ((away - along @ t["basis"].T) ** 2).sum(1)
    return np.asarray(0.5 * (out * out).sum(1) - log + t["rest"] * left)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    length = g.op("Sqrt", g.sum(g.op("Mul", phi, phi), 1, keepdims=True))
    x = g.op("Div", phi, g.op("Max", length, g.const(LEAST)))
    away = g.op("Sub", x, g.const(t["mean"]))
    along = g.op("MatMul", away, g.const(t["basis"]))
    x, logs = g.op("Mul", along, g.const(t["scale"])), []
    layers = [g.const(p) for p in _layers(state)]
    for i in range(0, len(layers), PARTS):
        a, a0, s, s0, b, b0 = layers[i : i + PARTS]
        h = g.op("Tanh", g.op("Gemm", x, a, a0))
        scale = g.op("Tanh", g.op("Gemm", h, s, s0))
        x = g.op("Add", g.op("Mul", x, g.op("Exp", scale)), g.op("Gemm", h, b, b0))
        logs.append(scale)
    half = g.op("Mul", g.sum(g.op("Mul", x, x), 1), g.const(0.5))
    found = g.op("Sub", half, g.sum(g.op("Sum", *logs), 1))
    if not t["rest"]:
        return found
    left = g.op("Sub", away, g.op("MatMul", along, g.const(t["basis"].T)))
    square = g.sum(g.op("Mul", left, left), 1)
    return g.op("Add", found, g.op("Mul", square, g.const(t["rest"])))


def _layers(state: State) -> list[Array]:
    return [state.tensors[f"layer{i}"] for i in range(PARTS * RECIPE.layers)]
