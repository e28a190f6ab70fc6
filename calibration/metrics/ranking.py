"""Ranking figures: AUROC, AUPR and FPR95 of a score, risk-coverage of a confidence.

These are exact, ties included, and keep 8 bytes a row: a ranking is not a sum. Scores are larger
for the stranger row, so out-of-distribution rows (or errors) are the positives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from calibration.metrics.bootstrap import Estimate, group_codes
from posthoc.contract import F64, Array, DataError


def auroc(negatives: Array, positives: Array) -> float:
    """P(score of a positive > score of a negative), ties counting half.

    The Mann-Whitney statistic of N negatives and M positives. Raises DataError where a side is
    empty or holds a NaN.
    """
    neg, pos = _scores(negatives, "negatives"), _scores(positives, "positives")
    return float(_placements(pos, np.sort(neg)).mean())


def auroc_estimate(
    negatives: Array,
    positives: Array,
    *,
    negative_groups: Array | None = None,
    positive_groups: Array | None = None,
    level: float = 0.95,
) -> Estimate:
    """AUROC with its normal interval, cut to [0, 1].

    DeLong, DeLong & Clarke-Pearson 1988, "Comparing the areas under two or more correlated
    receiver operating characteristic curves"; over groups as Obuchowski 1997, "Nonparametric
    analysis of clustered ROC curve data", where no group has rows on both sides.
    """
    neg, pos = _scores(negatives, "negatives"), _scores(positives, "positives")
    above = _placements(pos, np.sort(neg))
    below = _placements(-neg, np.sort(-pos))
    value = float(above.mean())
    variance = _mean_variance(above, positive_groups) + _mean_variance(below, negative_groups)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def aupr(negatives: Array, positives: Array) -> float:
    """Average precision ``sum_k (R_k - R_{k-1}) P_k`` over the distinct thresholds.

    It depends on the share of positives; a random score has that share as its value.
    """
    neg, pos = _scores(negatives, "negatives"), _scores(positives, "positives")
    thresholds, hits = np.unique(pos, return_counts=True)
    recalled = np.cumsum(hits[::-1])[::-1]
    false = len(neg) - np.searchsorted(np.sort(neg), thresholds, side="left")
    return float((hits * (recalled / (recalled + false))).sum()) / len(pos)


def fpr95(negatives: Array, positives: Array) -> float:
    """Share of positives (out) let through where at least 95 % of negatives (in) are.

    Liang, Li & Srikant 2018, "Enhancing the reliability of out-of-distribution image detection":
    false positive rate at 95 % true positive rate, in-distribution rows being what is accepted.
    """
    neg, pos = _scores(negatives, "negatives"), _scores(positives, "positives")
    threshold = np.sort(neg)[math.ceil(0.95 * len(neg)) - 1]
    return float((pos <= threshold).mean())


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Selective risk against coverage, N points from the most confident row to all rows.

    ``aurc`` is the mean of the risks (Geifman, Uziel & El-Yaniv 2019, "Bias-reduced uncertainty
    estimation for deep neural classifiers"); ``augrc`` the area under risk × coverage (Traub et
    al. 2024, "Overcoming common flaws in the evaluation of selective classification systems"),
    which weighs every error alike.
    """

    coverage: F64
    risk: F64
    aurc: float
    augrc: float


def risk_coverage(confidence: Array, loss: Array) -> RiskCoverage:
    """The curve for N confidences and N losses (0/1 errors or any loss).

    Rows of equal confidence are taken in random order, in expectation, so that the answer does
    not depend on the order of the rows.
    """
    c = _scores(confidence, "confidence")
    if len(loss) != len(c):
        raise DataError(f"loss has {len(loss)} rows where there are {len(c)}")
    _, block, sizes = np.unique(-c, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    losses = np.bincount(block, weights=np.asarray(loss, dtype=np.float64))
    answered = np.arange(1, len(c) + 1)
    total = np.interp(answered, ends, np.concatenate([[0.0], np.cumsum(losses)]))
    risk = total / answered
    # Trapezoids from (0, 0): exact for a cumulated loss that is linear between rows.
    area = (total.sum() - total[-1] / 2) / len(c) ** 2
    return RiskCoverage(answered / len(c), risk, float(risk.mean()), float(area))


def _scores(x: Array, name: str) -> F64:
    a = np.asarray(x, dtype=np.float64).ravel()
    if not len(a):
        raise DataError(f"{name}: a ranking needs at least one row on each side")
    if np.isnan(a).any():
        raise DataError(f"{name}: row {int(np.isnan(a).argmax())} is NaN")
    return a


def _placements(x: F64, others: F64) -> F64:
    """Share of the sorted ``others`` below each x, ties counting half."""
    below = np.searchsorted(others, x, side="left") + np.searchsorted(others, x, side="right")
    share: F64 = below / (2 * len(others))
    return share


def _mean_variance(x: F64, groups: Array | None) -> float:
    """Variance of the mean of x, summed over groups first; 0 where there is one group only."""
    codes, n_groups = group_codes(groups, len(x))
    if n_groups < 2:
        return 0.0
    sums = np.bincount(codes, weights=x - x.mean())
    return float((sums**2).sum() * n_groups / (n_groups - 1) / len(x) ** 2)
