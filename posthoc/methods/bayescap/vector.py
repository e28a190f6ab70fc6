"""BayesCap on a vector of outputs: how wide, and how heavy-tailed, the error of a row is.

The frozen output z stays the mean, exactly; a small network beside it gives the alpha and beta of
a generalised Gaussian for every output (Upadhyay et al. 2022, arXiv:2207.06873). It sees z, and
the features if there are any and they are wanted: a black box is enough. It is trained by the true
likelihood: the loss that the authors released has a product where the density has a power, and
fits beta = 0.68 to any data.

Beside it stands the homoscedastic generalised Gaussian of the rows. Rows held out say when to stop,
which share of the way from that to the network is gone (perhaps none, setting ``gate`` of the
state) and the scale of alpha, for every output. What it gives is noise, not strangeness: the
variance of the error on rows like those of the fit. The strength that is fitted later mixes it with
a constant variance. alpha and beta themselves, for likelihoods and quantiles, come from
`parameters`.

Outside the range of its rows a network may say anything. What it says is kept inside the range that
it had on held-out rows, and while a row's largest standardised input grows from R to 1.5 R (R: what
999 of 1000 held-out rows stay below) alpha is raised to the homoscedastic one at least, and the
tails likewise.

Memory of a fit is one block of rows, the held-out ones, some 5,000 at most, and 50,000 errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.methods.bayescap import generalised_gaussian as gg
from posthoc.methods.bayescap.parameters import (
    INSIDE,
    bounds,
    constants,
    emit_log_beta,
    emit_log_variance_factor,
    finest,
    log_beta,
    middle,
    objective,
    recalibrate,
)
from posthoc.methods.loss.inputs import Inputs, measure
from posthoc.methods.loss.perceptron import forward
from posthoc.methods.loss.training import Batch, Recipe, recut, train
from posthoc.rows import HELD_OUT, Rows

INFO = Info(
    name="bayescap",
    kind="module",
    tasks=("regression",),
    needs=frozenset({"labels"}),
    summary="a small network that gives the error of each row a generalised Gaussian: its scale "
    "and its tails",
    paper=Paper(
        "BayesCap: Bayesian Identity Cap for Calibrated Uncertainty in Frozen Neural Networks",
        2022,
        "https://arxiv.org/abs/2207.06873",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


class Settings(BaseModel):
    """``features`` auto (if there are any), true or false: whether the network sees them beside
    the outputs; ``width`` and ``layers`` of the network; ``learning_rate``, ``weight_decay`` and
    ``batch_size`` of AdamW, at most ``steps`` steps, stopped after ``patience`` looks at held-out
    rows without a better one; ``seed`` of the first weights and of the order of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    features: Literal["auto"] | bool = "auto"
    width: int = Field(default=128, ge=1)
    layers: int = Field(default=2, ge=1, le=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    batch_size: int = Field(default=256, ge=2)
    steps: int = Field(default=5000, ge=1)
    patience: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)


FEWEST = 20  # rows
HELD_MOST = 5000  # rows held out; memory stays bounded
LEAST_SHARE = 1000  # and at least one row in so many is held out
ERRORS = 50_000  # that the homoscedastic distribution is fitted to


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """Train on four rows of five; the fifth (at most some 5,000 rows) says when to stop, which
    share of the network is kept and the scale.

    Raises FitError for fewer than 20 rows, for features that are asked for and are not there, and
    for labels that a regressor predicts without error.
    """
    del head, task
    if rows.n < FEWEST:
        raise FitError(f"bayescap needs at least {FEWEST} rows and has {rows.n}")
    seen = recut(Rows(lambda: _seen(rows, settings), rows.n))
    kept, held = seen.hold_out(min(max(HELD_OUT, rows.n // HELD_MOST), LEAST_SHARE))
    inputs = measure(kept, "regression", 1)
    noise, errors = _mean_square(seen), _errors(seen)
    fixed, start, least = constants(errors), middle(errors), finest(errors)
    k = len(fixed) // 2

    def batch(block: Features) -> Batch:
        return inputs(block.phi, block.z)[0].astype(np.float32), gg.log_size(_error(block), least)

    layers, steps, _ = train(
        kept,
        [batch(b) for b in blocks_of.of(held, settings.batch_size)],
        batch,
        objective(start),
        Recipe(
            sizes=(len(inputs.mean), *(settings.width,) * settings.layers, 2 * k),
            **settings.model_dump(exclude={"features", "width", "layers"}),
        ),
    )
    layers[-1] = layers[-1] + (start - fixed)
    x, away = inputs(held.phi, held.z)
    reach = float(np.quantile(away, INSIDE)) or 1.0
    raw = _network(layers, x)
    low, high = bounds(raw)
    chosen = recalibrate(
        _cautious(np.clip(raw, low, high), away, reach), gg.log_size(_error(held), least), fixed
    )
    gate = np.tile(chosen.gate, 2)
    layers[-2:] = layers[-2] * gate, layers[-1] * gate
    said: dict[str, Any] = {
        **settings.model_dump(),
        "features": inputs.features,
        "rows": rows.n,
        "held_out_rows": len(held),
        "steps_taken": steps,
        "gate": chosen.gate.tolist(),
        "scale": np.exp(chosen.log_scale).tolist(),
        "homoscedastic_alpha": np.exp(fixed[:k]).tolist(),
        "homoscedastic_beta": np.exp(log_beta(fixed[k:])).tolist(),
        "held_out_nll": chosen.nll.tolist(),
        "held_out_nll_homoscedastic": chosen.nll_constant.tolist(),
        "noise_variance": noise.tolist(),
    }
    tensors: dict[str, Array] = {
        "mean": inputs.mean,
        "scale": inputs.scale,
        "low": low * gate,
        "high": high * gate,
        "reach": np.asarray([reach]),
        "constants": np.concatenate([fixed[:k] + chosen.log_scale, fixed[k:]]),
        **{f"layer{i}": np.asarray(p, np.float32) for i, p in enumerate(layers)},
    }
    return State(tensors, said)


def parameters(state: State, phi: Array | None, z: Array) -> tuple[F64, F64]:
    """(alpha N×K in units of the outputs, beta N×K) of N rows, the float64 definition; the module
    `generalised_gaussian` has their likelihood and quantiles."""
    t, k = state.tensors, state.tensors["constants"].size // 2
    x, away = _inputs(state)(phi, z)
    raw = np.clip(_network(_layers(state), x), t["low"], t["high"])
    found = _cautious(raw, away, float(t["reach"][0])) + t["constants"]
    return np.exp(found[:, :k]), np.exp(log_beta(found[:, k:]))


def spread(state: State, phi: Array | None, z: Array) -> Spread:
    """The variances N×K of N rows (float64 definition)."""
    return Spread(gg.variance(*parameters(state, phi, z)))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t, k = state.tensors, state.tensors["constants"].size // 2
    x, away = _inputs(state).emit(g, phi, z)
    *hidden, weight, bias = _layers(state)
    for i in range(0, len(hidden), 2):
        x = g.op("Relu", g.op("Gemm", x, g.const(hidden[i]), g.const(hidden[i + 1])))
    share = g.op("Sub", g.const(3.0), g.op("Mul", away, g.const(2.0 / t["reach"])))
    share = g.op("Clip", share, g.const(0.0), g.const(1.0))

    def output(part: slice, cautious: str) -> str:
        value = g.op("Gemm", x, g.const(weight[:, part]), g.const(bias[part]))
        value = g.op("Max", g.op("Min", value, g.const(t["high"][part])), g.const(t["low"][part]))
        return g.op(cautious, value, g.op("Mul", value, share))

    a, b = output(slice(k), "Max"), output(slice(k, None), "Min")
    u = emit_log_beta(g, g.op("Add", b, g.const(t["constants"][k:])))
    h = g.op("Add", g.op("Add", a, a), emit_log_variance_factor(g, u))
    # The constant alpha last: in units of the outputs its logarithm may be large.
    return SpreadNames(g.op("Mul", g.op("Exp", h), g.const(np.exp(2 * t["constants"][:k]))))


def _cautious(raw: F64, away: F64, reach: float) -> F64:
    """What the network says N×2K, where the largest input N×1 is out of reach no less wide and no
    lighter-tailed than the constants."""
    share = np.clip(3.0 - 2.0 * away / reach, 0.0, 1.0)
    k = raw.shape[1] // 2
    a, b = raw[:, :k], raw[:, k:]
    return np.concatenate([np.maximum(a, a * share), np.minimum(b, b * share)], 1)


def _inputs(state: State) -> Inputs:
    t = state.tensors
    return Inputs("regression", 1, state.settings["features"], t["mean"], t["scale"])


def _layers(state: State) -> list[Array]:
    return [state.tensors[f"layer{i}"] for i in range(2 * state.settings["layers"] + 2)]


def _network(layers: list[Array], x: F64) -> F64:
    return np.asarray(forward([np.asarray(p, np.float64) for p in layers], x)[-1])


def _seen(rows: Rows, settings: Settings) -> Iterator[Features]:
    """The rows with the features that the network is to see."""
    for block in rows:
        if settings.features is False or block.phi is None:
            if settings.features is True:
                raise FitError(
                    "bayescap was asked to see features and this model is a black box; set "
                    "features=auto"
                )
            yield Features(None, block.z, block.y)
            continue
        if not np.isfinite(block.phi).all():
            raise FitError("bayescap met features that are not finite")
        yield block


def _error(block: Features) -> F64:
    return np.asarray(block.y, np.float64) - np.asarray(block.z, np.float64)


def _errors(rows: Rows) -> F64:
    """Errors of all rows, or of one in so many."""
    step = -(-rows.n // ERRORS)
    return np.concatenate([_error(b)[::step] for b in rows])


def _mean_square(rows: Rows) -> F64:
    total = sum((_error(b) ** 2).sum(0) for b in rows)
    noise = np.asarray(total, np.float64) / rows.n
    if not np.all(noise > 0):
        raise FitError("bayescap: the model predicts the labels without error; check for leakage")
    return noise
