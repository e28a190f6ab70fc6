"""Ranking figures: AUROC, AUPR and FPR95 of a score, risk-coverage of a confidence.

These are exact, ties included, and need every row at once: a ranking is not a sum. As folds, exact
at 8 bytes a row or within a stated error in constant memory, they are in ``ranking_folds``. Scores
are larger for the stranger row, so out-of-distribution rows (or errors) are the positives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from calibration.metrics.bootstrap import Estimate, group_codes
from posthoc.contract import F64, Array, DataError


@dataclass(frozen=True, slots=True)
class Bounded:
    """A figure, and a bound on how far the exact one is from it."""

    value: float
    error: float


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


def auroc_difference(
    a: tuple[Array, Array],
    b: tuple[Array, Array],
    *,
    negative_groups: Array | None = None,
    positive_groups: Array | None = None,
    level: float = 0.95,
) -> Estimate:
    """AUROC of score a less that of b, each ``(negatives, positives)`` of the same N and M rows,
    with its normal interval, cut to [-1, 1]: DeLong et al. 1988, for two correlated curves.

    Raises DataError as `auroc` does, and for scores of other numbers of rows.
    """
    (neg_a, pos_a), (neg_b, pos_b) = (
        (_scores(neg, "negatives"), _scores(pos, "positives")) for neg, pos in (a, b)
    )
    if len(neg_a) != len(neg_b) or len(pos_a) != len(pos_b):
        raise DataError("a paired difference needs the same rows on both sides")
    above = _placements(pos_a, np.sort(neg_a)) - _placements(pos_b, np.sort(neg_b))
    below = _placements(-neg_a, np.sort(-pos_a)) - _placements(-neg_b, np.sort(-pos_b))
    value = float(above.mean())
    variance = _mean_variance(above, positive_groups) + _mean_variance(below, negative_groups)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half))


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
    which weighs every error alike; ``e_aurc`` (excess AURC, Geifman et al. 2019) is ``aurc`` less
    that of the order by the loss itself, which no confidence can beat: 0 at best.
    """

    coverage: F64
    risk: F64
    aurc: float
    augrc: float
    e_aurc: float

    def risk_at(self, coverage: float) -> float:
        """Selective risk of the most confident share ``coverage`` (above 0, at most 1) of rows.

        Of N rows the first ``ceil(coverage N)``; where equal confidences go across that line, in
        expectation over their order. Raises DataError for another share.
        """
        if not 0 < coverage <= 1:
            raise DataError(f"a share of rows to answer lies in (0, 1], which {coverage} does not")
        n = len(self.risk)
        return float(self.risk[max(1, math.ceil(round(coverage * n, 9))) - 1])

    def coverage_at(self, risk: float) -> float:
        """The largest share of rows, most confident first, whose selective risk is at most
        ``risk``; 0 where there is none. Measured on these rows, no promise for others."""
        found = np.flatnonzero(self.risk <= risk + 1e-12)
        return float(self.coverage[found[-1]]) if len(found) else 0.0


def risk_coverage(confidence: Array, loss: Array) -> RiskCoverage:
    """The curve for N confidences and N losses (0/1 errors or any loss).

    Rows of equal confidence are taken in random order, in expectation, so that the answer does
    not depend on the order of the rows.
    """
    c = _scores(confidence, "confidence")
    if len(loss) != len(c):
        raise DataError(f"loss has {len(loss)} rows where there are {len(c)}")
    each = np.asarray(loss, dtype=np.float64)
    if not np.isfinite(each).all():
        row = int(np.argmin(np.isfinite(each)))
        raise DataError(f"row {row}: loss {each[row]} is no finite number")
    _, block, sizes = np.unique(-c, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    losses = np.bincount(block, weights=each)
    answered = np.arange(1, len(c) + 1)
    total = np.interp(answered, ends, np.concatenate([[0.0], np.cumsum(losses)]))
    risk = total / answered
    # Trapezoids from (0, 0): exact for a cumulated loss that is linear between rows.
    area = (total.sum() - total[-1] / 2) / len(c) ** 2
    best = float((np.cumsum(np.sort(each)) / answered).mean())
    aurc = float(risk.mean())
    return RiskCoverage(answered / len(c), risk, aurc, float(area), aurc - best)


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
