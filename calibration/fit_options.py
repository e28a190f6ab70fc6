"""What a user may ask of a fit, and what goes together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from calibration.conformal.intervals import INTERVALS, QUANTILE_LEVELS, Side
from calibration.conformal.scores import METHODS, page
from calibration.head import Prediction
from calibration.recalibration import Kind
from calibration.shift.weighted import Shift
from posthoc import links, registry
from posthoc.contract import F64, Array, Features, FitError, Task

RANK = "rank:"  # before scores whose ranks are averaged
Scale = Literal["auto", "none", "temperature", "ets", "svs", "sms", "beta", "isotonic"]


class FitOptions(BaseModel):
    """What a user may ask of a fit.

    ``method`` none is scaling alone, ``settings`` are the method's own; ``prediction`` module is
    needed by a method that refits the head. ``predictive`` is the way from Gaussian logits to
    probabilities, ``draws`` the number of fixed logit draws (even; default 16, 64 for mc) where a
    module has none of its own. ``mask`` is the class of a segmentation whose
    pixels the sets are to hold: the promise is then about the share of them that is missed.
    ``scaling`` is the family of probabilities after temperature and strength, auto the one that
    surely gains, none the frozen model; ``confidence`` may have a family of its own.
    ``side`` is which ends an interval has, ``recalibration`` how ``quantile_levels`` are served.
    ``shift`` is how production rows differ: in the shares of classes (or the distribution of the
    target), or in their covariates. ``given`` asks for a threshold of its own for each class,
    cluster of classes or group, and ``randomised`` for scores that spread ties by a number u of
    each row. ``ood`` auto chooses, a+b is the mean of scores and rank:a+b that of their ranks. What
    does not go together is refused by `check_options`, and by `fit_head` where only the fitted
    module can tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: Task
    method: str = "laplace"
    settings: dict[str, Any] = Field(default_factory=dict)
    prediction: Prediction = "frozen"
    predictive: links.Predictive = "probit"
    scaling: Scale = "temperature"
    confidence: Literal["probs", "beta", "isotonic"] = "probs"
    draws: int | None = Field(default=None, ge=2, le=4096, multiple_of=2)
    conformal: str | None = None  # default: lac, or residual for a regression
    side: Side = "two"
    recalibration: Kind = "emp"
    quantile_levels: tuple[float, ...] = Field(default=QUANTILE_LEVELS, min_length=1)
    given: Literal["class", "cluster", "group"] | None = None
    randomised: bool = False
    shift: Shift | None = None
    mask: int | None = Field(default=None, ge=0)
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
    """The three parts that a fit may see. ``per`` rows in a row are the pixels of one image; the
    conformal rows are whole images then, each of another item. ``groups`` are those of the
    conformal rows, ``u`` their numbers in [0, 1) for randomised scores; ``keys`` are those of the
    calibration rows, of which equal ones are one item's; ``production`` are rows without labels, of
    what is to come."""

    module: Features
    calibration: Features
    conformal: Features
    per: int = 1
    groups: Array | None = None
    u: F64 | None = None
    production: Features | None = None
    keys: Array | None = None
    strange: dict[str, tuple[str, Features]] = field(default_factory=dict)


def check_options(options: FitOptions) -> None:
    """What can be refused before any data is read: FitError naming an unknown name or level."""
    if options.method != "none":
        info = registry.info(options.method)
        if info.kind != "module" or options.task not in info.tasks:
            raise FitError(f"{options.method!r} is not a module for {options.task}")
        if not (info.preserves or info.either) and options.prediction == "frozen":
            raise FitError(
                f"{options.method} refits the head, so that its answer may differ from the frozen "
                "model's; ask for it with --prediction module"
            )
        kept = info.preserves or (info.either and options.task == "regression")
        if kept and options.prediction == "module" and options.predictive == "probit":
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
    if options.mask is not None and (
        options.given is not None
        or options.task == "regression"
        or options.conformal not in (None, "lac")
    ):
        raise FitError("--mask is for a segmentation with --conformal lac")
    if options.task == "regression" and (
        options.randomised or options.given not in (None, "group")
    ):
        raise FitError("classes and randomised scores are for classification; --given group is not")
    known = METHODS if options.task == "classification" else INTERVALS
    if options.conformal not in (None, *known):
        raise FitError(
            f"unknown conformal method {options.conformal!r} for {options.task}; "
            f"there are {', '.join(known)}"
        )
    if options.task == "regression" and (
        options.scaling != "temperature" or options.confidence != "probs"
    ):
        raise FitError("--scaling and --confidence are for classification")
    if options.scaling == "none" and options.method != "none":
        raise FitError(
            "--scaling none is the frozen model and goes with --method none; the strength of "
            f"{options.method} is a part of scaling"
        )
    if options.task == "classification" and (
        options.side != "two" or options.recalibration != "emp"
    ):
        raise FitError("--side and --recalibration are for regression")
    if options.task == "classification" and options.quantile_levels != QUANTILE_LEVELS:
        raise FitError("--quantiles are for regression; a class has none")
    if options.shift is not None and (options.given is not None or options.mask is not None):
        raise FitError("--shift weighs all rows together; leave --given and --mask out")
    levels = options.quantile_levels
    if not all(0 < a < 1 for a in levels) or list(levels) != sorted(set(levels)):
        raise FitError(f"quantile levels rise strictly between 0 and 1, not {list(levels)}")
    if (
        options.task == "classification"
        and options.randomised
        and not page(options.conformal or "lac").RANDOMISES
    ):
        raise FitError(
            f"{options.conformal or 'lac'} has nothing to randomise; take --conformal aps, raps, "
            "saps or topk"
        )
    for name in () if options.ood in ("auto", "none") else score_names(options.ood):
        if registry.info(name).kind != "score" or options.task not in registry.info(name).tasks:
            raise FitError(f"{name!r} is not an OOD score for {options.task}")
    for alpha in options.alphas:
        if not 0 < alpha < 1:
            raise FitError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    for what, given in (("alpha", options.alphas), ("OOD score", score_names(options.ood))):
        if len(set(given)) < len(given):
            raise FitError(f"the same {what} is named twice")


def score_names(ood: str) -> list[str]:
    """The scores that ``ood`` names: a, a+b or rank:a+b; FitError for one without a name."""
    names = ood.removeprefix(RANK).split("+")
    if "" in names:
        raise FitError(f"--ood {ood} lacks a score; it is a, a+b or rank:a+b, as rank:gen+rmds")
    return names


def _check_no_module(options: FitOptions) -> None:
    for flag_, given in (
        ("--set", bool(options.settings)),
        ("--prediction module", options.prediction == "module"),
        (f"--predictive {options.predictive}", options.predictive != "probit"),
        ("--draws", options.draws is not None),
    ):
        if given:
            raise FitError(f"{flag_} belongs to a module; there is none with --method none")
