"""What confidence says of rows without labels: expected accuracy, and labels weighed by what was
served.

Both rest on assumptions that no data here can check. They are texts of this page, to be printed
beside the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calibration.metrics.totals import ClassificationTotals
from posthoc.contract import Array, DataError

EXPECTED_ASSUMES = (
    "Expected accuracy is right only where confidence is still calibrated on these rows. It does "
    "not see a change of the truth that leaves the model as confident as before."
)
STRATIFIED_ASSUMES = (
    "Weighed by served shares these are right only if, among rows of equal confidence, labels are "
    "missing at random. Nothing corrects for reporting that depends on whether the model was right."
)


@dataclass(frozen=True, slots=True)
class Expected:
    """Accuracy that ``n`` rows are expected to have, and the standard deviation of the accuracy
    that they will have had, if rows are right independently with their confidence. nan for no
    rows."""

    n: int
    accuracy: float
    spread: float


def expected_accuracy(count: Array, confidence_sum: Array) -> Expected:
    """From rows by confidence bin, and the sum of confidence of each bin (B each).

    Estimated as in NannyML's CBPE: the mean confidence. The spread is binomial with the mean
    confidence of each bin, hardly more than with each row's own: sum c(1-c) <= n mean(1 - mean).
    Raises DataError for lengths that differ and a mean confidence outside [0, 1].
    """
    n, c = _means(count, confidence_sum)
    total = float(n.sum())
    if not total:
        return Expected(0, math.nan, math.nan)
    return Expected(int(total), float(n @ c) / total, math.sqrt(float(n @ (c * (1 - c)))) / total)


@dataclass(frozen=True, slots=True)
class Bias:
    """How much better than they were the labelled rows claimed to be: expected (mean confidence)
    less observed accuracy, above 0 for a model that is too sure.

    ``raw``: of the ``n`` labelled rows as they came. Were confidence calibrated on them it would
    vary with the standard deviation ``spread``. ``stratified``: each confidence bin counts as it
    was served; of the ``share`` of served rows whose bin has labels. Each with its standard error;
    nan for no rows.
    """

    n: int
    raw: float
    raw_error: float
    spread: float
    stratified: float
    stratified_error: float
    share: float


def measured_bias(served: Array, labelled: ClassificationTotals) -> Bias:
    """Of ``expected_accuracy``, from ``served`` rows by confidence bin (20) and the totals of those
    that got labels.

    Both are of the same rows, bin by bin: ``sum_b w_b (c_b - a_b)`` with mean confidence c_b,
    labelled accuracy a_b, and shares w_b labelled or served. Errors count a bin's variance as that
    of (right + 1) of (n + 2) rows; the raw one counts, too, that the next labels may fall into
    other bins. Subtracted from the expected accuracy of all served rows, the stratified bias says
    what labels make of it, under ``STRATIFIED_ASSUMES``. Raises DataError as ``post_stratified``.
    """
    weighed = post_stratified(served, labelled)
    claimed = expected_accuracy(labelled.count, labelled.confidence_sum)
    n, c = _means(labelled.count, labelled.confidence_sum)
    filled = n > 0
    n, c, right = n[filled], c[filled], labelled.correct[filled]
    s = np.asarray(served, np.float64)[filled]
    raw = claimed.accuracy - labelled.accuracy
    if not claimed.n:
        return Bias(0, raw, math.nan, math.nan, math.nan, math.nan, weighed.share)
    smoothed = (right + 1) / (n + 2)
    variance = float(n @ (smoothed * (1 - smoothed) + (c - right / n - raw) ** 2))
    stratified = float(s @ c / s.sum()) - weighed.accuracy if s.sum() else math.nan
    return Bias(
        n=claimed.n,
        raw=raw,
        raw_error=math.sqrt(variance) / claimed.n,
        spread=claimed.spread,
        stratified=stratified,
        stratified_error=weighed.accuracy_error,
        share=weighed.share,
    )


@dataclass(frozen=True, slots=True)
class PostStratified:
    """Figures of labelled rows weighed so that each confidence bin counts as it was served.

    ``accuracy`` has standard error ``accuracy_error``; a calibrated model's ``ece`` stays below
    ``ece_floor`` (mean and three standard deviations). ``share`` of served rows lies in bins that
    have labels; of the others nothing is known, and they are left out. nan for no such bin.
    """

    accuracy: float
    accuracy_error: float
    ece: float
    ece_floor: float
    share: float


def post_stratified(served: Array, labelled: ClassificationTotals) -> PostStratified:
    """From ``served`` rows by confidence bin (20) and the totals of those that got labels.

    Post-stratification (Holt & Smith 1979, "Post stratification", JRSS A 142): ``sum_b w_b a_b``
    with shares served w_b and labelled accuracies a_b. The error counts a bin's variance as that of
    (right + 1) of (n + 2) rows, since one label shows no spread. With labels in the shares that
    were served, accuracy and ECE are the raw ones. Raises DataError for another number of bins and
    for counts that are negative or not finite.
    """
    s = np.asarray(served, np.float64)
    if s.shape != labelled.count.shape or not (np.isfinite(s).all() and (s >= 0).all()):
        raise DataError(f"served rows are {len(labelled.count)} counts by bin, not {s.shape}")
    n, c = _means(labelled.count, labelled.confidence_sum)
    known = (n > 0) & (s > 0)
    if not known.any():
        return PostStratified(math.nan, math.nan, math.nan, math.nan, 0.0 if s.sum() else math.nan)
    share = float(s[known].sum() / s.sum())
    n, c, w = n[known], c[known], s[known] / s[known].sum()
    right = labelled.correct[known]
    a = right / n
    smoothed = (right + 1) / (n + 2)
    scatter = w**2 * c * (1 - c) / n  # of a calibrated model's gap
    return PostStratified(
        accuracy=float(w @ a),
        accuracy_error=math.sqrt(float((w**2 * smoothed * (1 - smoothed) / n).sum())),
        ece=float(w @ np.abs(a - c)),
        ece_floor=float(np.sqrt(2 / math.pi * scatter).sum())
        + 3 * math.sqrt((1 - 2 / math.pi) * float(scatter.sum())),
        share=share,
    )


def _means(count: Array, confidence_sum: Array) -> tuple[Array, Array]:
    """Rows and mean confidence by bin; 0 of an empty bin."""
    n, total = np.asarray(count, np.float64), np.asarray(confidence_sum, np.float64)
    if n.ndim != 1 or n.shape != total.shape:
        raise DataError(f"counts of shape {n.shape} have sums of confidence of {total.shape}")
    c = np.divide(total, n, out=np.zeros(len(n)), where=n > 0)
    if not ((c >= -1e-6) & (c <= 1 + 1e-6)).all():
        raise DataError("a bin has a mean confidence outside [0, 1]")
    return n, np.clip(c, 0.0, 1.0)
