"""Evaluate class probabilities, confidences, sets and scores on test rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from calibration.evaluation.parts import (
    HEDGED,
    Resampling,
    against,
    answered,
    check_rows,
    difference,
    differences,
    figure,
    figures,
    independent,
    level,
    ood_results,
    reliability,
    shares_of_sizes,
)
from calibration.evaluation.records import (
    Curve,
    Difference,
    Evaluation,
    Figure,
    System,
)
from calibration.metrics.calibration_error import (
    debiased_ece,
    ece_difference,
    perfect_band,
)
from calibration.metrics.coverage import set_sizes
from calibration.metrics.proper import brier_score
from calibration.metrics.ranking import auroc, auroc_estimate, risk_coverage
from calibration.metrics.totals import (
    ClassificationTotals,
    update_classification,
)
from posthoc.contract import F64, I64, Array
from posthoc.folds import class_index, log_loss_of_probs, run

FROZEN, SCALED = "frozen", "temperature scaled"
_CURVE_POINTS = 200


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
    groups: Array | None = None,
    about: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Frozen, temperature-scaled and hedged probabilities of the same N test rows, compared.

    ``frozen_probs`` and ``scaled_probs`` are N×C; ``fields`` holds the hedged prediction by the
    names of ``posthoc.contract.Classification`` (label, probs and confidence at least; abstain
    and ood are used where present); ``y`` N true classes; ``sets`` N×C masks by alpha, made with
    ``n_conformal`` conformal rows, the default level first; ``ood_in`` N scores by score name and
    ``ood_out`` the same scores by name of a strange set; ``groups`` (N) and ``ood_groups`` (by
    strange set) are ids of rows that are no independent evidence. Raises DataError where lengths
    differ or a label is no class.
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
    return Evaluation(
        task="classification",
        about=dict(about or {}),
        n=len(truth),
        n_conformal=n_conformal,
        label_equal=float((np.asarray(fields["label"]) == label).mean()),
        systems=tuple(_system(n, r, truth, losses[n], resampling) for n, r in rated.items()),
        differences=tuple(compared),
        levels=tuple(
            level(a, t.coverage, t.mean_size, units, n_conformal, t.empty_share)
            for a, t in sizes.items()
        ),
        set_sizes=tuple(shares_of_sizes(a, t) for a, t in sizes.items()),
        answered=answered(
            fields,
            {a: _at(mask, truth) for a, mask in sets.items()},
            losses[HEDGED]["accuracy"],
        ),
        ood=ood,
        scores=scores,
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
        "aurc": Figure(value=curve.aurc),
        "augrc": Figure(value=curve.augrc),
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


def _at(table: Array, index: I64) -> Array:
    """The entry of each row at its index."""
    return np.asarray(table)[np.arange(len(index)), index]
