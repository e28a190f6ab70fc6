"""Density of the features under a normalising flow (Real NVP, Dinh et al. 2017, arXiv:1605.08803).

score = minus the logarithm, without its constant, of the density of at most 17 numbers of a row:
the features along their 16 most variable directions (centred, at variance one), and the logarithm
of the length of what is left of them, standardised. Strange rows often leave the directions of the
others altogether (Wang et al. 2022, arXiv:2203.10807): a density along them alone does not see it,
and one of every feature sees little else. `posthoc.ood.coupling` has the layers. They begin as a
Gaussian and stop at their best on a fifth of the rows that they are not trained on, so that on
those they are never worse than it.

The fit is a fold: the rows are a `posthoc.ood.sample` of at most 20,000, and the flow is trained on
them in their order there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import sample
from posthoc.ood.coupling import PARTS, Recipe, forward, train
from posthoc.ood.gaussian import exact, real
from posthoc.ood.sample import Sample
from posthoc.rows import HELD_OUT

INFO = Info(
    name="flow",
    kind="score",
    tasks=("classification", "regression"),
    needs=frozenset({"features"}),
    summary="density of the features under a normalising flow",
    paper=Paper("Density Estimation Using Real NVP", 2017, "https://arxiv.org/abs/1605.08803"),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
ROWS = 20_000
FEWEST = 20
DIRECTIONS = 16
ROWS_EACH = 10  # at least so many rows a direction
FLAT = 1e-6  # of the largest variance: a direction with less is left out
SHORT = 1e-3  # of the length of the features around their mean: a shorter rest counts as this
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
    phi = np.asarray(stats.phi, np.float64)
    mean = exact(phi.mean(0))
    away = phi - mean
    values, vectors = np.linalg.eigh(away.T @ away / len(away))
    total = float(np.maximum(values, 0.0).sum())
    if total <= 1e-13 * float((phi * phi).mean() * phi.shape[1]):
        raise FitError("flow: every feature is constant on the given rows; give more, or others")
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int((values > FLAT * values[0]).sum())
    kept = min(DIRECTIONS, rank, max(1, len(phi) // ROWS_EACH))
    basis = vectors[:, :kept]
    tensors: dict[str, Array] = {
        "mean": mean,
        "basis": basis,
        "scale": 1 / np.sqrt(values[:kept]),
        "rest": np.zeros(0),
    }
    if values[kept:].sum() > FLAT * total:  # else nothing is left but rounding
        short = SHORT**2 * total
        rest = np.log(np.maximum(((away - (away @ basis) @ basis.T) ** 2).sum(1), short))
        tensors["rest"] = np.asarray([rest.mean(), 1 / max(float(rest.std()), 0.01), short])
    x = _numbers(tensors, phi).astype(np.float32)
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
            "explained": float(values[:kept].sum() / total),
            "steps": steps,
            "held_out_nats": value,
        },
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D, in nats (float64 definition)."""
    del z
    out, log = forward(_layers(state), _numbers(state.tensors, np.asarray(phi)))
    return np.asarray(0.5 * (out * out).sum(1) - log)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    away = g.op("Sub", phi, g.const(t["mean"]))
    along = g.op("MatMul", away, g.const(t["basis"]))
    x = g.op("Mul", along, g.const(t["scale"]))
    if len(t["rest"]):
        middle, scale, short = t["rest"]
        left = g.op("Sub", away, g.op("MatMul", along, g.const(t["basis"].T)))
        square = g.sum(g.op("Mul", left, left), 1, keepdims=True)
        size = g.op("Log", g.op("Max", square, g.const(short)))
        size = g.op("Mul", g.op("Sub", size, g.const(middle)), g.const(scale))
        x = g.op("Concat", x, size, axis=1)
    layers, logs = [g.const(p) for p in _layers(state)], []
    for i in range(0, len(layers), PARTS):
        a, a0, s, s0, b, b0 = layers[i : i + PARTS]
        h = g.op("Tanh", g.op("Gemm", x, a, a0))
        scale = g.op("Tanh", g.op("Gemm", h, s, s0))
        x = g.op("Add", g.op("Mul", x, g.op("Exp", scale)), g.op("Gemm", h, b, b0))
        logs.append(scale)
    half = g.op("Mul", g.sum(g.op("Mul", x, x), 1), g.const(0.5))
    return g.op("Sub", half, g.sum(g.op("Sum", *logs), 1))


def _layers(state: State) -> list[Array]:
    return [state.tensors[f"layer{i}"] for i in range(PARTS * RECIPE.layers)]


def _numbers(tensors: dict[str, Array], phi: Array) -> F64:
    """What the flow sees of N rows."""
    away = np.asarray(phi, np.float64) - tensors["mean"]
    along = away @ tensors["basis"]
    x = along * tensors["scale"]
    if not len(tensors["rest"]):
        return np.asarray(x)
    middle, scale, short = tensors["rest"]
    square = ((away - along @ tensors["basis"].T) ** 2).sum(1, keepdims=True)
    return np.concatenate([x, (np.log(np.maximum(square, short)) - middle) * scale], 1)
