"""Evaluate predictions on test rows: every figure of the report, computed from arrays.

The arrays come from the fused graph itself, so that what is measured is what is served.
"""

from calibration.evaluation.classification import evaluate_classification
from calibration.evaluation.records import Evaluation
from calibration.evaluation.regression import evaluate_regression

__all__ = ["Evaluation", "evaluate_classification", "evaluate_regression"]
