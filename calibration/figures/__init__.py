"""The figures of the report as plotly JSON, each with the sentence that says what it means."""

from __future__ import annotations

from collections.abc import Iterator

from calibration.evaluation.records import Evaluation
from calibration.figures.classification import reliability, risk_coverage, set_sizes
from calibration.figures.dense import calibration_curve, sparsification, uncovered
from calibration.figures.panel import Panel, unit
from calibration.figures.regression import pit, quantiles, width_groups, widths
from calibration.figures.sets import confidences, spreads, under_corruption
from calibration.figures.shared import coverage, scores

__all__ = ["Panel", "panels"]


def panels(evaluation: Evaluation) -> Iterator[Panel]:
    """The figures that the evaluation has the numbers for, in reading order."""
    if any(s.reliability for s in evaluation.systems):
        yield reliability(evaluation)
    if evaluation.confidences is not None:
        yield confidences(evaluation)
    if any(s.pit for s in evaluation.systems):
        yield pit(evaluation)
    if evaluation.quantiles is not None:
        yield quantiles(evaluation)
    if evaluation.dense is not None and evaluation.dense.variance:
        yield calibration_curve(evaluation.dense.variance)
    if any(s.risk_coverage for s in evaluation.systems):
        yield risk_coverage(evaluation)
    if evaluation.levels:
        yield coverage(evaluation)
    if evaluation.levels and evaluation.levels[0].images is not None:
        yield uncovered(evaluation.levels[0])
    if evaluation.set_sizes:
        yield set_sizes(evaluation.set_sizes[0], evaluation.levels[0], unit(evaluation))
    if evaluation.dense is not None and evaluation.dense.sparsification:
        yield sparsification(evaluation.dense.sparsification[0], evaluation)
    if evaluation.widths is not None:
        yield widths(evaluation.widths, evaluation)
    if evaluation.width_groups:
        yield width_groups(evaluation)
    if evaluation.spreads is not None:
        yield spreads(evaluation)
    if any(s.corruption for s in evaluation.sets):
        yield under_corruption(evaluation)
    for i, histogram in enumerate(evaluation.scores):
        yield scores(i, histogram, evaluation)
