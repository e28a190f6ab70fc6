"""Monte-Carlo dropout before the last linear layer, from cached features.

Dropout at inference draws from an approximate posterior of the network (Gal & Ghahramani 2016,
arXiv:1506.02142). With masks m on the features only, no pass of the network is needed: a member's
outputs differ from the frozen ones by

    d = ((m - 1) * phi) W'          (classification: centred over classes)

Entries of a mask have mean 1 and variance o = p / (1 - p) at rate p, so that d has mean 0 and its
exact variance is o (phi * phi)(W * W)'. That is what the probit link and a regression are served,
without any sampling. S fixed masks decompose the uncertainty, and are averaged by the link mc.

Masks average to exactly 1 in each feature, so that the members' mean is the frozen outputs at any
S. ``bernoulli``: each feature is dropped in k of the S masks and divided by the share (S - k) / S
that keeps it. Its uniforms are stratified (one in each interval of length 1/S, in random order), so
that k is pS rounded up or down, pS on average, and a mask alone is an ordinary one, independent
over features. Mean square of m - 1 over the S masks: k / (S - k), which is o where pS is whole.
``gaussian``: m = 1 + sqrt(o) n (Srivastava et al. 2014; Kingma et al. 2015, arXiv:1506.02557), n
normal in antithetic pairs and with mean square 1 in each feature.

A rate at which the network was not trained must be found. The rule is the label-free one of
training-free Bayesianization (Shi et al. 2024, arXiv:2412.05723): as much noise as leaves the
predictions where they are.

Memory of a fit: at most 2,000 rows in float64, one block, and the masks S×D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames, per_difference, softmax
from posthoc.methods.held import hashes
from posthoc.methods.laplace.criteria import gaussian_variation as gaussian_variation
from posthoc.rows import Rows, check, join, take, unlabelled

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="head_dropout",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head"}),
    summary="Monte-Carlo dropout before the last layer; its rate is set without labels",
    paper=Paper(
        "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning",
        2016,
        "https://arxiv.org/abs/1506.02142",
    ),
)

Kind = Literal["bernoulli", "gaussian"]
Rule = Literal["both", "variation", "flips"]


class Settings(BaseModel):
    """``rate`` p of the dropout; None: the largest at which, on at most 2,000 rows, the mean of the
    members' probabilities is near the frozen ones. By ``rule``, the mean total variation between
    the two (variation), the share of rows whose most probable class is another (flips), or each of
    them (both) is at most ``epsilon``. In a regression the total variation is between Gaussians
    about the frozen mean, of the residual variance and of that plus the dropout's. No labels are
    used (in a regression they give the residual variance), and the rate is uncalibrated.

    Classification only: ``kind`` bernoulli or gaussian of the masks, their number ``samples``
    (even) and ``seed``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rate: float | None = Field(default=None, gt=0, lt=1)
    rule: Rule = "both"
    epsilon: float = Field(default=0.01, ge=1e-9, lt=1)
    kind: Kind = "bernoulli"
    samples: int = Field(default=32, ge=2, le=4096, multiple_of=2)
    seed: int = Field(default=0, ge=0)

    @field_validator("rule", "epsilon")
    @classmethod
    def _of_the_search(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("rate") is not None:
            raise ValueError("the rate is given; leave it out")
        return value


ROWS = 2000  # that judge a rate, at most
FEWEST = 500  # and at least, where there are so many
LARGEST = 0.9  # of the rates that the rule considers
_WORK = 4_000_000  # numbers N×S×C of one look at a rate
_START = 1e-3  # variance in squared logits, or residual variances, from which the rule looks up
_CLOSE = 0.01  # of log p / (1 - p), where the rate is searched
_TIE = 1e-9  # probabilities as near as this are not in another order
# Of numbers S×C×D: while they fit a cache, all members' weights are one matrix and one product;
# beyond, the masks are applied to the features (at 1,000 classes 1.5 to 15 times as fast).
FUSED = 1 << 20


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The rate and the masks.

    Raises FitError for a head that predicts the same whatever the features, for a rate at which the
    masks drop no feature or one of them in every mask, and in a regression for absent labels, a
    model without errors and for settings of masks, which it has none of.
    """
    weight = np.asarray(head.weight, np.float64)
    if not (np.ptp(weight, 0) if task == "classification" else weight).any():
        raise FitError(
            "head_dropout: the head's weights are all equal, so that it predicts nothing"
        )
    if task == "regression":
        return _fit_values(rows, weight, settings)
    weight = (weight - weight.mean(0)).astype(np.float32).astype(np.float64)
    masks = _masks(settings, weight.shape[1])
    most = LARGEST if settings.kind == "gaussian" else min(LARGEST, 1 - 1 / settings.samples)
    said: dict[str, Any]
    if settings.rate is None:
        judges = _judges(rows, _WORK // (settings.samples * len(weight)))
        unit = float((real(judges.phi) ** 2 @ per_difference(weight.T)).mean())
        distances = _distances(judges, weight, masks)

        def judged(odds: float) -> float:
            variation, flips = distances(odds)
            by_rule = {"variation": variation, "flips": flips, "both": max(variation, flips)}
            return by_rule[settings.rule]

        odds, said = _largest(judged, settings.epsilon, unit, most)
        variation, flips = distances(odds)
        said |= {"rule": settings.rule, "judges": len(judges)}
        said |= {"total_variation": variation, "flips": flips}
    else:
        odds, said = settings.rate / (1 - settings.rate), {"rule": "given"}
    noise = masks(odds)
    if not noise.any():
        if settings.rate is not None:
            raise FitError(
                f"head_dropout: at rate {settings.rate} no feature is dropped in any of the "
                f"{settings.samples} masks; give a larger rate, more samples or kind=gaussian"
            )
        odds = 0.0  # one feature of one mask is more than epsilon allows
    said |= {"kind": settings.kind, "samples": settings.samples, "seed": settings.seed}
    if settings.kind == "bernoulli":
        said["dropped"] = float((noise == -1.0).mean())
    return _state(task, weight, odds, {**said, "rows": rows.n}, noise=noise)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the dropout adds to the outputs of N rows (float64 definition)."""
    weight = np.asarray(state.tensors["weight"], np.float64)
    features, odds = real(phi), _odds(state)
    if state.settings["task"] == "regression":
        variance = features**2 @ (odds * weight.T**2)
        return Spread(variance, np.sqrt(variance), np.eye(len(weight)))
    return Spread(
        features**2 @ (odds * per_difference(weight.T)),
        draws=np.stack([(features * m) @ weight.T for m in state.tensors["noise"]], 1),
        class_variance=features**2 @ (odds * weight.T**2),
    )


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    weight, odds = np.asarray(state.tensors["weight"], np.float64).T, _odds(state)
    squared = g.op("Mul", phi, phi)
    by_class = g.op("MatMul", squared, g.const(odds * weight**2))
    if state.settings["task"] == "regression":
        return SpreadNames(by_class, g.op("Sqrt", by_class), np.eye(weight.shape[1]))
    noise = state.tensors["noise"]
    (s, d), c = noise.shape, weight.shape[1]
    if s * d * c <= FUSED:
        members = noise.T[:, :, None] * weight[:, None, :]
        flat = g.op("MatMul", phi, g.const(members.reshape(d, s * c)))
        draws = g.op("Reshape", flat, g.const([0, s, c], "int64"))
    else:
        masked = g.op("Mul", g.unsqueeze(phi, 1), g.const(noise[None]))
        draws = g.op("MatMul", masked, g.const(weight))
    pairs = g.const(odds * per_difference(weight)[:, None])
    return SpreadNames(g.op("MatMul", squared, pairs), draws=draws, class_variance=by_class)


def real(values: Array | None) -> F64:
    """The numbers in float64."""
    return np.asarray(values, np.float64)


def _odds(state: State) -> float:
    rate = float(state.settings["rate"])
    return rate / (1 - rate)


def _state(task: Task, weight: F64, odds: float, said: dict[str, Any], **more: Array) -> State:
    rate = odds / (1 + odds)
    tensors = {"weight": weight.astype(np.float32), **more}
    return State(tensors, {"task": task, "rate": rate, **said})


def _fit_values(rows: Rows, weight: F64, settings: Settings) -> State:
    """The rate and the noise of a regression, whose predictive is the exact one of all masks."""
    if given := settings.model_fields_set & {"kind", "samples", "seed"}:
        raise FitError(
            "head_dropout: the variance of a regression is exact and has no masks; leave "
            f"{' and '.join(sorted(given))} out"
        )
    if settings.rule == "flips":
        raise FitError("head_dropout: a regression has no classes to flip; use rule=variation")
    check(rows, replace(INFO, needs=frozenset({"labels"})), "regression")
    total = sum(((real(b.y) - real(b.z)) ** 2).sum(0) for b in rows)
    noise = np.asarray(total, np.float64) / rows.n
    if not np.all(noise > 0):
        raise FitError(
            "head_dropout: the model predicts the labels without error; check for leakage"
        )
    if settings.rate is None:
        judges = _judges(rows, ROWS)
        ratio = real(judges.phi) ** 2 @ weight.T**2 / noise
        odds, said = _largest(
            lambda odds: gaussian_variation(1.0 + odds * ratio),
            settings.epsilon,
            float(ratio.mean()),
            LARGEST,
        )
        said |= {"rule": "variation", "judges": len(judges)}
    else:
        odds, said = settings.rate / (1 - settings.rate), {"rule": "given"}
    return _state(
        "regression", weight, odds, {**said, "rows": rows.n, "noise_variance": noise.tolist()}
    )


def _masks(settings: Settings, d: int) -> Callable[[float], F64]:
    """The masks less one, S×D, as a function of p / (1 - p); the same random numbers for all."""
    rng, s = np.random.default_rng(settings.seed), settings.samples
    if settings.kind == "gaussian":
        half = rng.standard_normal((s // 2, d))
        half /= np.sqrt((half**2).mean(0))
        normal = np.concatenate([half, -half])
        return lambda odds: np.sqrt(odds) * normal
    strata = rng.permuted(np.tile(np.arange(s)[:, None], d), axis=0)
    uniform = (strata + rng.random(d)) / s

    def masks(odds: float) -> F64:
        kept = uniform >= odds / (1 + odds)
        share = kept.mean(0)
        if not share.all():
            raise FitError(
                f"head_dropout: at rate {odds / (1 + odds):.4g} some feature is dropped in all of "
                f"the {s} masks; give a smaller rate or more samples"
            )
        return np.asarray(kept / share - 1.0)

    return masks


def _judges(rows: Rows, most: int) -> Features:
    """The rows, or of more than ``most`` (and FEWEST, up to ROWS) those with the smallest hashes of
    their features: the same however the rows are ordered or cut."""
    most = min(max(most, FEWEST), ROWS)
    kept: Features | None = None
    keys = np.zeros(0, np.uint64)
    for block in map(unlabelled, rows):
        kept = block if kept is None else join([kept, block])
        keys = np.concatenate([keys, hashes(block.phi)])
        order = np.argsort(keys, kind="stable")[:most]
        kept, keys = take(kept, order), keys[order]
    assert kept is not None
    return kept


def _distances(
    judges: Features, weight: F64, masks: Callable[[float], F64]
) -> Callable[[float], tuple[float, float]]:
    """(mean total variation, share of flips) between the members' mean and the frozen softmax, as
    a function of p / (1 - p)."""
    phi, z = real(judges.phi), real(judges.z)
    frozen = softmax(z)
    label = z.argmax(1)[:, None]

    def distances(odds: float) -> tuple[float, float]:
        noise = masks(odds)
        total = np.zeros_like(frozen)
        for m in noise:
            # At small rates many a mask drops nothing.
            total += softmax(z + (phi * m) @ weight.T) if m.any() else frozen
        p = total / len(noise)
        behind = p.max(1) - np.take_along_axis(p, label, 1)[:, 0]
        variation = 0.5 * np.abs(p - frozen).sum(1).mean()
        return float(variation), float((behind > _TIE).mean())

    return distances


def _largest(
    distance: Callable[[float], float], epsilon: float, unit: float, most: float
) -> tuple[float, dict[str, Any]]:
    """(p / (1 - p), what the state says of it): from little noise up to the first at which
    ``distance`` is above ``epsilon``. ``unit`` is the mean variance at p / (1 - p) = 1, ``most``
    the largest rate."""
    said: dict[str, Any] = {"epsilon": epsilon, "uncalibrated": True}
    end = most / (1 - most)
    good = min(_START / unit, end) if unit > 0 else end
    while distance(good) > epsilon:
        good /= 100
    while good < end and distance(min(4 * good, end)) <= epsilon:
        good = min(4 * good, end)
    if good == end:
        return end, {**said, "rate_unlimited": True}
    bad = min(4 * good, end)
    while np.log(bad / good) > _CLOSE:
        middle = float(np.sqrt(good * bad))
        good, bad = (good, middle) if distance(middle) > epsilon else (middle, bad)
    return good, said
