"""Evaluate class probabilities, confidences, sets and scores on test rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from calibration.evaluation.examples import spread_over, wrong_and_sure
from calibration.evaluation.parts import (
    HEDGED,
    IN_ROWS,
    Named,
    Places,
    Resampling,
    against,
    answered,
    check_rows,
    difference,
    differences,
    figure,
    figures,
    histogram,
    independent,
    level,
    named_parts,
    ood_results,
    reliability,
    shares_of_sizes,
    size_violation,
    slice_part,
)
from calibration.evaluation.records import (
    Curve,
    Difference,
    Evaluation,
    Figure,
    System,
)
from calibration.metrics import brier
from calibration.metrics.calibration_error import (
    debiased_ece,
    ece_difference,
    perfect_band,
)
from calibration.metrics.class_calibration import ClassTotals
from calibration.metrics.coverage import set_sizes
from calibration.metrics.equal_mass import equal_mass_ece
from calibration.metrics.ks import ks_error
from calibration.metrics.perfect import N_SIM, perfect_class_ranges, perfect_ranges
from calibration.metrics.proper import brier_score
from calibration.metrics.ranking import auroc, auroc_estimate, risk_coverage
from calibration.metrics.smooth import smooth_ece
from calibration.metrics.top_label import top_label_ece
from calibration.metrics.totals import (
    ClassificationTotals,
    update_classification,
)
from posthoc.contract import F64, I64, Array
from posthoc.folds import class_index, log_loss_of_probs, run

FROZEN, SCALED = "frozen", "temperature scaled"
_CURVE_POINTS = 200
_RISKS_AT = (0.8, 0.9)  # shares of rows answered
_LEAST_LOG = -14.0  # of a probability that tells slices apart


def evaluate_classification(
    *,
    frozen_probs: Array,
    scaled_probs: Array | None = None,
    fields: Mapping[str, Array],
    y: Array,
    sets: Mapping[float, Array],
    n_conformal: int,
    ood_in: Mapping[str, Array] | None = None,
    ood_out: Mapping[str, Mapping[str, Array]] | None = None,
    ood_groups: Mapping[str, Array] | None = None,
    ood_doubts: Mapping[str, Array] | None = None,
    groups: Array | None = None,
    named: Named | None = None,
    places: Places | None = None,
    classes: Sequence[str] | None = None,
    about: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Frozen, temperature-scaled and hedged probabilities of the same N test rows, compared.

    ``frozen_probs`` and ``scaled_probs`` are N×C; ``fields`` holds the hedged prediction by the
    names of ``posthoc.contract.Classification`` (label, probs and confidence at least; abstain
    and ood are used where present); ``y`` N true classes; ``sets`` N×C masks by alpha, made with
    ``n_conformal`` conformal rows, the default level first; ``ood_in`` N scores by score name and
    ``ood_out`` the same scores by name of a strange set, ``ood_doubts`` its confidences; ``groups``
    (N) and ``ood_groups`` (by strange set) are ids of rows that are no independent evidence;
    ``named`` are the groups that coverage is split by; with ``places`` the worst rows are named,
    by ``classes``. Raises DataError where lengths differ, a label is no class, or
    probabilities do not sum to 1.
    """
    truth = class_index(y, np.shape(frozen_probs)[1])
    units = independent(len(truth), groups)
    check_rows(
        len(truth),
        {
            "frozen_probs": frozen_probs,
            **({} if scaled_probs is None else {"scaled_probs": scaled_probs}),
            **fields,
            **{f"set at alpha {a}": mask for a, mask in sets.items()},
            **{f"score {name}": score for name, score in (ood_in or {}).items()},
        },
    )
    label = np.argmax(frozen_probs, axis=1)
    resampling = Resampling(groups, n_boot, seed)
    rated = {
        FROZEN: _Rated(label, _at(frozen_probs, label), frozen_probs),
        **(
            {}
            if scaled_probs is None
            else {SCALED: _Rated(label, _at(scaled_probs, label), scaled_probs)}
        ),
        HEDGED: _Rated(fields["label"], fields["confidence"], fields["probs"]),
    }
    losses = {name: _losses(r, truth) for name, r in rated.items()}
    pairs = {name: (r.confidence, losses[name]["accuracy"]) for name, r in rated.items()}
    compared: list[Difference] = []
    for other in [name for name in (SCALED, FROZEN) if name in rated]:
        compared += differences(losses, ("nll", "brier"), other, resampling)
        gap = ece_difference(pairs[HEDGED], pairs[other], groups=groups, n_boot=n_boot, seed=seed)
        compared.append(difference("debiased_ece", other, gap))
    sizes = {
        alpha: run(set_sizes(np.shape(mask)[1]), [{"set": mask, "y": truth}])
        for alpha, mask in sets.items()
    }
    ood, scores = ood_results(ood_in, ood_out, groups, ood_groups)
    covered = {a: _at(mask, truth) for a, mask in sets.items()}
    with np.errstate(divide="ignore"):
        described = np.maximum(np.log(np.asarray(frozen_probs, np.float64)), _LEAST_LOG)
    default = next(iter(sets), None)
    return Evaluation(
        task="classification",
        about=dict(about or {}),
        n=len(truth),
        n_conformal=n_conformal,
        label_equal=float((np.asarray(fields["label"]) == label).mean()),
        systems=tuple(_system(n, r, truth, losses[n], resampling) for n, r in rated.items()),
        differences=tuple(compared),
        levels=tuple(
            level(a, t.coverage, t.mean_size, units, n_conformal, t.empty_share).model_copy(
                update={
                    "size_violation": size_violation(a, t, n_conformal, resampling),
                    "groups": named_parts(a, covered[a], named, n_conformal, groups),
                    "worst_slice": slice_part(a, described, covered[a], n_conformal, resampling)
                    if a == default
                    else None,
                }
            )
            for a, t in sizes.items()
        ),
        set_sizes=tuple(shares_of_sizes(a, t) for a, t in sizes.items()),
        answered=answered(fields, covered, losses[HEDGED]["accuracy"]),
        ood=ood,
        scores=scores,
        confidences=histogram(
            "confidence", {IN_ROWS: fields["confidence"], **(ood_doubts or {})}, span=(0.0, 1.0)
        ),
        spreads=None
        if default is None
        else spread_over(
            default,
            np.asarray(sets[default]).sum(axis=1, dtype=np.float64),
            covered[default],
            named,
            ("answer", _names(fields["label"], classes)),
        ),
        worst=wrong_and_sure(fields, truth, places, classes),
    )


class _Rated(NamedTuple):
    """What one system says of N rows: label N, confidence N, probs N×C."""

    label: Array
    confidence: Array
    probs: Array


def _losses(r: _Rated, y: I64) -> dict[str, F64]:
    return {
        "accuracy": (np.asarray(r.label) == y).astype(np.float64),
        "nll": log_loss_of_probs(r.probs, y),
        "brier": brier_score(r.probs, y),
    }


def _system(
    name: str, r: _Rated, y: I64, losses: Mapping[str, F64], resampling: Resampling
) -> System:
    totals = update_classification(
        ClassificationTotals(), confidence=r.confidence, label=r.label, y=y
    )
    band = perfect_band(r.confidence, seed=resampling.seed)
    wrong = losses["accuracy"] == 0
    curve = risk_coverage(r.confidence, wrong)
    metrics = {
        **figures(losses, resampling),
        "ece": against(totals.ece, band.ece),
        "debiased_ece": against(debiased_ece(totals), band.debiased_ece),
        **_calibration(r, y, ~wrong, min(N_SIM, resampling.n_boot), resampling.seed),
        "aurc": Figure(value=curve.aurc),
        "augrc": Figure(value=curve.augrc),
        "e_aurc": Figure(value=curve.e_aurc),
        **{f"error_at_{100 * s:g}": Figure(value=curve.risk_at(s)) for s in _RISKS_AT},
    }
    if wrong.any() and not wrong.all():
        unsure = -np.asarray(r.confidence, dtype=np.float64)
        sides = unsure[~wrong], unsure[wrong]
        # A group with right and wrong rows stands on both sides: the interval knows no such case.
        metrics["error_auroc"] = (
            figure(auroc_estimate(*sides))
            if resampling.groups is None
            else Figure(value=auroc(*sides))
        )
    at = np.unique(np.linspace(0, len(wrong) - 1, _CURVE_POINTS).astype(np.int64))
    return System(
        name=name,
        metrics=metrics,
        reliability=reliability(totals.count, totals.correct, totals.confidence_sum, band),
        risk_coverage=Curve(x=tuple(curve.coverage[at].tolist()), y=tuple(curve.risk[at].tolist())),
    )


def _calibration(r: _Rated, y: I64, right: Array, n_sim: int, seed: int) -> dict[str, Figure]:
    """Calibration errors beyond ECE beside a perfect model's range, and the parts of Brier."""
    n_classes = np.shape(r.probs)[1]
    order = np.argsort(r.confidence, kind="stable")  # sorted rows cost every draw less
    c, label = np.asarray(r.confidence)[order], np.asarray(r.label)[order]
    of_confidence: dict[str, Callable[[F64], float]] = {
        "smooth_ece": lambda hit: smooth_ece(c, hit),
        "ks_error": lambda hit: ks_error(c, hit),
        "equal_mass_ece": lambda hit: equal_mass_ece(c, hit),
        "top_label_ece": lambda hit: top_label_ece(c, label, hit, n_classes),
    }
    of_classes: dict[str, Callable[[ClassTotals], float]] = {
        "class_ece": lambda bins: bins.static,
        "brier_reliability": brier.reliability,
    }
    ranges = perfect_ranges(c, of_confidence, n_sim=n_sim, seed=seed)
    ranges |= perfect_class_ranges(r.probs, of_classes, n_sim=n_sim, seed=seed)
    parts = run(brier.brier_parts(n_classes), [{"probs": r.probs, "y": y}])
    hit = np.asarray(right, np.float64)[order]
    values = {name: f(hit) for name, f in of_confidence.items()}
    values |= {name: f(parts.bins) for name, f in of_classes.items()}
    return {
        **{name: against(value, ranges[name]) for name, value in values.items()},
        "brier_resolution": Figure(value=parts.generalised_resolution),
        "brier_uncertainty": Figure(value=parts.uncertainty),
    }


def _at(table: Array, index: I64) -> Array:
    """The entry of each row at its index."""
    return np.asarray(table)[np.arange(len(index)), index]


def _names(label: Array, classes: Sequence[str] | None) -> Array:
    """Classes as the figures name them."""
    if classes is None:
        return np.char.add("class ", np.asarray(label).astype(str))
    return np.asarray(classes, str)[label]
