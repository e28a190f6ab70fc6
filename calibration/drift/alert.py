"""The line below which a window's coverage is worth an alert, as the rule in PromQL draws it."""

from __future__ import annotations

import math

from posthoc.contract import DataError


def coverage_threshold(level: float, labels: float, n_cal: int) -> float:
    """``level - 3 sqrt(p(1-p) (1/m + 1/(n_cal + 2)))`` with p = ``level``, m = ``labels``.

    The coverage of a healthy bundle is no level but a draw of Beta(k, n_cal+1-k), whose variance is
    p(1-p)/(n_cal + 2) (Vovk 2012, "Conditional validity of inductive conformal predictors"); the
    labels of the window add p(1-p)/m. Three standard deviations of both. Exactly, by the
    beta-binomial law, a healthy bundle lies below in 0.2 to 0.7 % of windows at levels up to 0.9,
    in up to 0.9 % at 0.95 from 50 labels on, and in up to 2 % at 0.99, where the law leans most;
    but the luck of the calibration is the same in all windows of one bundle. Raises DataError for
    a level outside (0, 1), no labels, or no calibration rows.
    """
    if not 0 < level < 1:
        raise DataError(f"a level lies strictly between 0 and 1, not {level}")
    if not labels > 0 or n_cal < 1:
        raise DataError(f"a threshold needs labels and calibration rows, not {labels} and {n_cal}")
    return level - 3 * math.sqrt(level * (1 - level) * (1 / labels + 1 / (n_cal + 2)))
