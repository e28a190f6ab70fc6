"""From cached rows to a calibrated head: every statistical decision of a fit, and no file.

Rows come in four disjoint parts. Module rows fit the posterior and the OOD scores; calibration
rows fit temperature and strength together and choose whatever has settings; conformal rows give
final ranks only; test rows are not seen here. Ranks are taken from the compiled graph's own
float32 scores, because that graph is what will be compared with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from calibration.bundle import (
    AbstainRecord,
    ConformalRecord,
    FittedRecord,
    Guarantee,
    OodRecord,
    conformal_rank,
    threshold_at,
)
from calibration.compile import compile_head
from calibration.conformal.intervals import (
    quantile_factors,
    residual_scores,
    signed_residuals,
)
from calibration.conformal.scores import METHODS, choose_raps
from calibration.fit_ood import fit_ood, flag
from calibration.head import Head, Prediction, reference
from calibration.scaling import Scaling, fit_classification, fit_regression
from calibration.threshold import fit_abstention, neyman_pearson_rows
from posthoc import links, registry
from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError, LinearHead, State, Task
from posthoc.runtime import open_session

_NUMBERS = 4_000_000  # N×S×C of one run of the compiled head
_ROUNDING = 1e-6  # of the outputs: float32 says no more


class FitOptions(BaseModel):
    """What a user may ask of a fit.

    ``method`` none is scaling alone, ``settings`` are the method's own; ``prediction`` module is
    needed by a method that refits the head. ``predictive`` is the way from Gaussian logits to
    probabilities, ``draws`` the number of fixed logit draws (even; default 16, 64 for mc) where a
    module has none of its own. ``ood`` auto chooses. What does not go together is refused by
    `check_options`, and by `fit_head` where only the fitted module can tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: Task
    method: str = "laplace"
    settings: dict[str, Any] = Field(default_factory=dict)
    prediction: Prediction = "frozen"
    predictive: links.Predictive = "probit"
    draws: int | None = Field(default=None, ge=2, le=4096, multiple_of=2)
    conformal: str | None = None  # default: lac, or residual for a regression
    alphas: tuple[float, ...] = Field(default=(0.1, 0.05), min_length=1)
    ood: str = "auto"
    ood_alpha: float = Field(default=0.05, gt=0, lt=1)
    ood_delta: float = Field(default=0.05, gt=0, lt=1)
    max_error: float | None = Field(default=0.05, gt=0, lt=1)
    error_delta: float = Field(default=0.05, gt=0, lt=1)
    tolerance: float | None = Field(default=None, gt=0)  # regression: wrong beyond it
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts that a fit may see."""

    module: Features
    calibration: Features
    conformal: Features


@dataclass(frozen=True, slots=True)
class Fitted:
    """A calibrated head, the records of its manifest and its sorted conformal scores."""

    head: Head
    module: FittedRecord
    scaling: Scaling
    conformal: ConformalRecord
    ood: OodRecord | None
    abstain: AbstainRecord | None
    scores: dict[str, Array]


def fit_head(
    linear: LinearHead | None,
    parts: Parts,
    options: FitOptions,
    posterior: tuple[str, State] | None = None,
    train: blocks_of.Rows | None = None,
) -> Fitted:
    """Fit module, scaling, conformal thresholds, OOD flag and abstention. A ``posterior`` (module
    and state) fitted elsewhere takes the place of the module's own fit; ``train`` are rows that the
    network was trained on, for the curvature.

    Raises FitError when a method is unknown or does not fit the model, when a part is empty or
    without labels, or when an interval is asked for at a level that the rows cannot support.
    """
    check_options(options)
    for name in ("module", "calibration", "conformal"):
        rows: Features = getattr(parts, name)
        if len(rows) == 0:
            raise FitError(f"no {name} rows: give more data or another --split")
        if rows.y is None:
            raise FitError("a fit needs labels: name their column with --target")
    if options.task == "classification" and len(np.unique(np.asarray(parts.calibration.y))) < 2:
        raise FitError("a temperature needs labels of at least two classes and has 1")
    module = posterior or _fit_module(linear, parts.module, options, train)
    spread = None if module is None else _spread(module, parts.calibration, options)
    noise = _noise(module, parts.module) if options.task == "regression" else None
    eps = _draws(spread, options)
    scaling = _fit_scaling(parts.calibration, spread, noise, module, options, eps)
    ood = fit_ood(
        linear,
        parts.module,
        parts.calibration,
        task=options.task,
        ood=options.ood,
        sampled=module is not None and "weight_samples" in registry.info(module[0]).needs,
    )
    head = Head(
        task=options.task,
        width=parts.module.z.shape[1],
        features=None if parts.module.phi is None else parts.module.phi.shape[1],
        module=module,
        temperature=scaling.temperature,
        strength=scaling.strength,
        noise=noise,
        eps=eps,
        # The mean over members is all that a mixture has.
        predictive="mc" if spread is not None and spread.variance is None else options.predictive,
        prediction=options.prediction,
        ood=ood,
        abstains=options.max_error is not None
        and (options.task == "classification" or options.tolerance is not None),
    )
    members = () if ood is None else ood.members
    if module is None and not any("features" in registry.info(m.name).needs for m in members):
        head = head.with_(features=None)  # nothing reads them
    if options.task == "classification":
        head = _choose_conformal(head, parts.calibration, options)
    return _thresholds(head, parts, options, scaling)


def check_options(options: FitOptions) -> None:
    """What can be refused before any data is read: FitError naming an unknown name or level."""
    if options.method != "none":
        info = registry.info(options.method)
        if info.kind != "module" or options.task not in info.tasks:
            raise FitError(f"{options.method!r} is not a module for {options.task}")
        if not info.preserves and options.prediction == "frozen":
            raise FitError(
                f"{options.method} refits the head, so that its answer may differ from the frozen "
                "model's; ask for it with --prediction module"
            )
        if info.preserves and options.prediction == "module" and options.predictive == "probit":
            raise FitError(
                f"{options.method} keeps the frozen model's answer; leave --prediction module out"
            )
        registry.settings(options.method, options.settings)
    else:
        _check_no_module(options)
    if options.task == "regression":
        if options.predictive != "probit":
            raise FitError(f"the link {options.predictive!r} is for classification")
        if options.draws is not None:
            raise FitError("--draws is for classification; error bars of a regression need none")
    elif options.tolerance is not None:
        raise FitError("--tolerance is for regression; a class is right or wrong")
    known = METHODS if options.task == "classification" else ("residual",)
    if options.conformal not in (None, *known):
        raise FitError(
            f"unknown conformal method {options.conformal!r} for {options.task}; "
            f"there are {', '.join(known)}"
        )
    for name in () if options.ood in ("auto", "none") else options.ood.split("+"):
        if registry.info(name).kind != "score" or options.task not in registry.info(name).tasks:
            raise FitError(f"{name!r} is not an OOD score for {options.task}")
    for alpha in options.alphas:
        if not 0 < alpha < 1:
            raise FitError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    for what, given in (("alpha", options.alphas), ("OOD score", options.ood.split("+"))):
        if len(set(given)) < len(given):
            raise FitError(f"the same {what} is named twice")


def _check_no_module(options: FitOptions) -> None:
    for flag_, given in (
        ("--set", bool(options.settings)),
        ("--prediction module", options.prediction == "module"),
        (f"--predictive {options.predictive}", options.predictive != "probit"),
        ("--draws", options.draws is not None),
    ):
        if given:
            raise FitError(f"{flag_} belongs to a module; there is none with --method none")


def _check_spread(name: str, spread: links.Spread, options: FitOptions) -> None:
    """The options that only the fitted module can tell to be meaningless."""
    if options.task == "regression":
        return
    if options.draws is not None and spread.directions is None:
        raise FitError(f"{name} has draws of its own or none; leave --draws out")
    if options.predictive == "probit":
        return
    if spread.variance is None:
        raise FitError(
            f"{name} is a mixture, whose members' probabilities are averaged; leave --predictive "
            f"{options.predictive} out"
        )
    if options.predictive == "mc" and not spread.decomposes:
        raise FitError(f"{name} has no draws to average; leave --predictive mc out")
    if options.predictive != "mc":
        links.class_variance(spread)


def _fit_module(
    linear: LinearHead | None, rows: Features, options: FitOptions, train: blocks_of.Rows | None
) -> tuple[str, State] | None:
    if options.method == "none":
        return None
    if linear is None and "linear_head" in registry.info(options.method).needs:
        have = {"labels"} | ({"features"} if rows.phi is not None else set())
        others = registry.applicable(registry.MODULES, options.task, have)
        raise FitError(
            f"{options.method} needs a linear head and this model is a black box; use --method "
            f"{' or '.join([*others, 'none'])} (scaling, conformal sets and output scores still "
            "work)"
        )
    name, own = options.method, blocks_of.of(rows)
    return name, registry.fit(name, linear, options.task, own, options.settings, train)


def _spread(module: tuple[str, State], rows: Features, options: FitOptions) -> links.Spread:
    name, state = module
    parts: list[links.Spread] = [
        registry.page(name).spread(state, b.phi, b.z) for b in blocks_of.of(rows)
    ]
    _check_spread(name, parts[0], options)
    return links.join(parts)


def _draws(spread: links.Spread | None, options: FitOptions) -> F64 | None:
    """Fixed normal draws S×R for a module with amplitudes; None where it has its own or none."""
    if spread is None or spread.directions is None or options.task == "regression":
        return None
    count = options.draws or (64 if options.predictive == "mc" else links.N_DRAWS)
    return links.normal_draws(len(spread.directions), options.seed, count)


def _noise(module: tuple[str, State] | None, rows: Features) -> F64:
    """Noise variance K of a regression: the module's own, or the module rows' mean square."""
    if module is not None:
        return np.asarray(module[1].settings["noise_variance"], np.float64)
    return np.asarray(((np.asarray(rows.y, np.float64) - rows.z) ** 2).mean(0))


def _fit_scaling(
    rows: Features,
    spread: links.Spread | None,
    noise: F64 | None,
    module: tuple[str, State] | None,
    options: FitOptions,
    eps: F64 | None,
) -> Scaling:
    assert rows.y is not None
    if noise is None:
        return fit_classification(rows.z, rows.y, spread, options.predictive, eps)
    df = math.inf if module is None else float(module[1].settings.get("df", math.inf))
    error = np.asarray(rows.y, np.float64) - rows.z
    if (error**2).mean() <= _ROUNDING**2 * (np.asarray(rows.z, np.float64) ** 2).mean():
        raise FitError("the model predicts the targets without error; check for leakage")
    return fit_regression(error, noise, spread, df)


def _choose_conformal(head: Head, rows: Features, options: FitOptions) -> Head:
    method = options.conformal or "lac"
    if method == "lac":
        return head.with_(conformal=method)
    assert rows.y is not None
    p = reference(head, rows.phi, rows.z)["probs"]
    settings = choose_raps(p, rows.y, options.alphas[0])
    return head.with_(conformal=method, conformal_settings=settings)


def run_head(head: Head, rows: Features) -> dict[str, Array]:
    """Every output of the compiled head, ``set_scores`` included, on cached rows in float32.

    Blocks are so small that the draws of one, N×S×C, are at most a few million numbers.
    """
    session = open_session(compile_head(head, scores=True))
    names = [o.name for o in session.get_outputs()]
    made: dict[str, list[Array]] = {n: [] for n in names}
    numbers = head.width * (links.N_DRAWS if head.eps is None else len(head.eps))
    for block in blocks_of.of(rows, min(blocks_of.BLOCK, max(16, _NUMBERS // numbers))):
        feed = {"z": np.asarray(block.z, np.float32)}
        if head.features is not None:
            feed["phi"] = np.asarray(block.phi, np.float32)
        for name, value in zip(names, session.run(names, feed), strict=True):
            made[name].append(value)
    return {n: np.concatenate(v) for n, v in made.items()}


def _thresholds(head: Head, parts: Parts, options: FitOptions, scaling: Scaling) -> Fitted:
    """Ranks of the conformal rows, by the compiled head."""
    rows = parts.conformal
    assert rows.y is not None
    out = run_head(head, rows)
    scores: dict[str, Array] = {}
    if head.task == "classification":
        true = out["set_scores"][np.arange(len(rows)), np.asarray(rows.y, np.int64)]
        scores["set"] = sorted_scores = np.sort(true)
        wrong = out["label"] != rows.y
        sureness: Literal["confidence", "std"] = "confidence"
    else:
        y = np.asarray(rows.y, np.float64)
        exact = residual_scores(y, out["mean"], out["std"])
        # The graph compares in float32: round up, so that a covered row stays covered.
        scores["interval"] = sorted_scores = np.sort(_float32_up(exact))
        signed = signed_residuals(y, out["mean"], out["std"])
        head = head.with_(quantile_factors=quantile_factors(signed))
        wrong = np.abs(y - out["mean"]).max(1) > (options.tolerance or math.inf)
        sureness = "std"
    guarantees = tuple(_guarantee(sorted_scores, a) for a in options.alphas)
    if head.task == "regression":
        for g in guarantees:
            if g.threshold is None:
                raise FitError(
                    f"an interval at alpha {g.alpha} needs at least {g.n_needed} conformal rows; "
                    f"there are {g.n}"
                )
    q = guarantees[0].threshold
    head = head.with_(q_hat=math.inf if q is None else q)
    ood_record = None
    if head.ood is not None:
        scores["ood"] = np.sort(out["ood_score"])
        found, ood_record = flag(head.ood, scores["ood"], options.ood_alpha, options.ood_delta)
        head = head.with_(ood=found)
    abstain = None
    if head.abstains:
        grid = run_head(head, parts.calibration)[sureness]
        sure = out[sureness]
        if sureness == "std":
            grid, sure = -grid.max(1), -sure.max(1)
        head, abstain = _abstain(head, grid, sure, wrong, options)
    module = FittedRecord(name="none")
    if head.module is not None:
        module = FittedRecord(name=head.module[0], settings=dict(head.module[1].settings))
    settings: dict[str, Any] = dict(head.conformal_settings)
    method = head.conformal if head.task == "classification" else "residual"
    conformal = ConformalRecord(method=method, settings=settings, guarantees=guarantees)
    return Fitted(head, module, scaling, conformal, ood_record, abstain, scores)


def _guarantee(sorted_scores: Array, alpha: float) -> Guarantee:
    n = len(sorted_scores)
    q = threshold_at(sorted_scores, alpha)
    return Guarantee(
        alpha=alpha,
        n=n,
        rank=conformal_rank(n, alpha),
        threshold=None if math.isinf(q) else q,
        n_needed=math.ceil(round(1 / alpha, 9)) - 1,
    )


def _abstain(
    head: Head, grid: Array, sure: Array, wrong: Array, options: FitOptions
) -> tuple[Head, AbstainRecord]:
    assert options.max_error is not None
    # A standard deviation has no upper end; the manifest holds no infinity and the graph float32.
    least = -1.0 if head.task == "classification" else float(np.finfo(np.float32).min)
    found = fit_abstention(grid, sure, wrong, options.max_error, options.error_delta, least=least)
    record = AbstainRecord(
        max_error=options.max_error,
        delta=options.error_delta,
        n=len(sure),
        n_needed=neyman_pearson_rows(options.max_error, options.error_delta),
        threshold=found.threshold,
        answered=found.answered,
    )
    return head.with_(abstain=found.threshold), record


def _float32_up(values: F64) -> Array:
    """The smallest float32 at or above each value."""
    low = values.astype(np.float32)
    return np.where(low < values, np.nextafter(low, np.float32(np.inf)), low)
