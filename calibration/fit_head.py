"""From cached rows to a calibrated head: every statistical decision of a fit, and no file.

Rows come in four disjoint parts. Module rows fit the posterior and the OOD scores; calibration
rows fit temperature and strength together and choose whatever has settings; conformal rows give
final ranks only; test rows are not seen here. Ranks are taken from the compiled graph's own
float32 scores, because that graph is what will be compared with them.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from calibration.conformal.intervals import Interval, make, signed_residuals
from calibration.conformal.scores import choose
from calibration.families import fit_family
from calibration.families.choice import Gain, candidates, chosen, gains
from calibration.fit_ood import fit_ood
from calibration.fit_options import FitOptions, Parts, check_options
from calibration.fit_thresholds import Fitted, fit_thresholds, run_head
from calibration.head import Head, Ood, right_or_wrong
from calibration.ood_choice import Choice, choose_score
from calibration.recalibration import base_of, knots
from calibration.scaling import (
    Scaling,
    fit_classification,
    fit_regression,
    fit_temperature,
    mean_nll,
)
from posthoc import links, registry
from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError, LinearHead, State
from posthoc.folds import Mapper

TINY = 1e-38  # of a probability, which has a logarithm in float32
_ROUNDING = 1e-6  # of the outputs: float32 says no more


def fit_head(
    linear: LinearHead | None,
    parts: Parts,
    options: FitOptions,
    posterior: tuple[str, State] | None = None,
    train: blocks_of.Rows | None = None,
    *,
    own: blocks_of.Rows | None = None,
    mapper: Mapper | None = None,
) -> Fitted:
    """Fit module, scaling, conformal thresholds, OOD flag and abstention. A ``posterior`` (module
    and state) fitted elsewhere takes the place of the module's own fit; ``train`` are rows that the
    network was trained on, for the curvature. ``own`` are the module rows once more, in shares:
    what is a sum over them is made by the workers of ``mapper``.

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
    own = blocks_of.of(parts.module) if own is None else own
    module = posterior or _fit_module(linear, parts.module, own, options, train, mapper)
    spread = None if module is None else _spread(module, parts.calibration, options)
    noise = _noise(module, parts.module) if options.task == "regression" else None
    eps = _draws(spread, options)
    scaling = _fit_scaling(parts.calibration, spread, noise, module, options, eps)
    ood, tried_scores = _choose_score(linear, parts, options, module, own, mapper)
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
    tried: tuple[Gain, ...] = ()
    if options.task == "classification":
        head, tried = _choose_family(head, parts.calibration, options, parts.keys)
        head = _choose_conformal(head, parts.calibration, options)
    else:
        head = head.with_(interval=_interval(head, parts.calibration, options))
    fitted = fit_thresholds(head, parts, options, scaling)
    record = fitted.ood and fitted.ood.model_copy(update={"tried": tried_scores})
    return dataclasses.replace(fitted, gains=tried, ood=record)


def _choose_score(
    linear: LinearHead | None,
    parts: Parts,
    options: FitOptions,
    module: tuple[str, State] | None,
    shares: blocks_of.Rows,
    mapper: Mapper | None,
) -> tuple[Ood | None, dict[str, dict[str, float]]]:
    """The score that was asked for or chosen, and what was tried for it.

    Where weights are sampled, what stands for features is the copies' outputs: no score reads them.
    """
    if options.ood == "none":
        return None, {}
    own, known = parts.module, parts.calibration
    if module and not registry.info(module[0]).needs.isdisjoint({"network", "weight_samples"}):
        linear, own, known = None, Features(None, own.z, own.y), Features(None, known.z, known.y)
        shares = blocks_of.of(own)
    choice = Choice(options.ood)
    if options.ood == "auto":
        choice = choose_score(
            linear, own, known, options.task, strange=parts.strange, seed=options.seed
        )
    if choice.score is None:
        return None, {}
    found = fit_ood(
        linear, own, known, task=options.task, ood=choice.score, own=shares, mapper=mapper
    )
    return found, choice.tried


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
    linear: LinearHead | None,
    rows: Features,
    own: blocks_of.Rows,
    options: FitOptions,
    train: blocks_of.Rows | None,
    mapper: Mapper | None,
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
    name = options.method
    return name, registry.fit(name, linear, options.task, own, options.settings, train, mapper)


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
    if options.scaling == "none":
        nll = mean_nll(rows.z, np.asarray(rows.y, np.int64))
        alone, _ = fit_temperature(np.asarray(rows.z, np.float64), np.asarray(rows.y, np.int64))
        return Scaling(1.0, 0.0, alone, nll, nll)
    if noise is None:
        return fit_classification(rows.z, rows.y, spread, options.predictive, eps)
    df = math.inf if module is None else float(module[1].settings.get("df", math.inf))
    error = np.asarray(rows.y, np.float64) - rows.z
    if (error**2).mean() <= _ROUNDING**2 * (np.asarray(rows.z, np.float64) ** 2).mean():
        raise FitError("the model predicts the targets without error; check for leakage")
    return fit_regression(error, noise, spread, df)


def _choose_family(
    head: Head, rows: Features, options: FitOptions, keys: Array | None
) -> tuple[Head, tuple[Gain, ...]]:
    """The head with its families, fitted last, and what was tried for them."""
    assert rows.y is not None
    name: str = options.scaling
    tried: tuple[Gain, ...] = ()
    y = np.asarray(rows.y, np.int64)
    if name in ("none", "temperature") and options.confidence == "probs":
        return head, tried
    plain = _answers(head, rows)
    log_p = np.log(np.maximum(plain["probs"].astype(np.float64), TINY))
    if name == "auto":
        tried = gains(log_p, y, candidates(len(y), head.width), options.seed, keys)
        name = chosen(tried) or "temperature"
    if name not in ("none", "temperature"):
        head = head.with_(family=fit_family(name, log_p, y))
        plain = _answers(head, rows)
    if options.confidence != "probs":
        both = right_or_wrong(plain["probs"], plain["label"])
        right = (plain["label"] == y).astype(np.int64)
        head = head.with_(sureness=fit_family(options.confidence, both, right))
    return head, tried


def _answers(head: Head, rows: Features) -> dict[str, Array]:
    """What the head says of rows, but for sets, flags and abstention."""
    plain = head.with_(ood=None, abstains=False, conformal="lac", randomised=False)
    return run_head(plain, rows)


def _interval(head: Head, rows: Features, options: FitOptions) -> Interval:
    """What intervals are made of, from calibration rows."""
    assert rows.y is not None and head.noise is not None
    method, base = options.conformal or "residual", base_of(head)
    tail = options.alphas[0] / (2 if options.side == "two" else 1)
    found = None
    if method == "cdf":
        out = run_head(head.with_(ood=None, abstains=False), rows)
        found = knots(base, signed_residuals(rows.y, out["mean"], out["std"]))
    margin = float(base.quantile(np.asarray(1 - tail)))
    return make(method, options.side, head.noise, margin, found)


def _choose_conformal(head: Head, rows: Features, options: FitOptions) -> Head:
    method = options.conformal or "lac"
    head = head.with_(conformal=method, randomised=options.randomised)
    if method == "lac":
        return head
    assert rows.y is not None
    p = _answers(head, rows)["probs"].astype(np.float64)
    return head.with_(conformal_settings=choose(method, p, rows.y, options.alphas[0]))
