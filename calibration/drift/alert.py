"""The line below which a window's coverage is worth an alert, as the rule in PromQL draws it."""

from __future__ import annotations

import math

from posthoc.contract import DataError

MARGIN = 3.0  # standard deviations


def coverage_threshold(level: float, labels: float, n_cal: float, margin: float = MARGIN) -> float:
    """``level - 3 sqrt(p(1-p) (1/m + 1/(n_cal + 2))) - 4/3 (2p - 1) (1/m + 2/(n_cal + 2))`` with
    p = ``level``, m = ``labels``; ``margin`` in place of 3, and of 4/3 its ``lean``.

    The coverage of a healthy bundle is no level but a draw of Beta(k, n_cal+1-k), whose variance is
    p(1-p)/(n_cal + 2) (Vovk 2012, "Conditional validity of inductive conformal predictors"); the
    labels of the window add p(1-p)/m. Three standard deviations of both, and the first term of
    Cornish & Fisher 1938 ("Moments and cumulants in the specification of distributions", Rev. Inst.
    Int. Stat. 5) for the law's skewness: the third central moment of the share of misses is
    p(1-p)(2p-1)(1/m + 1/n)(1/m + 2/n) with n = n_cal + 2, nearly. Exactly, by the beta-binomial
    law, a healthy bundle lies below in 0.01 to 0.19 % of windows of 20 labels or more at levels
    from 0.6 to 0.995 (a normal law: 0.135 %), where without that term it would in up to 2 %; but
    the luck of the calibration is the same in all windows of one bundle. Raises DataError for a
    level outside (0, 1), no labels, or no calibration rows.
    """
    if not 0 < level < 1:
        raise DataError(f"a level lies strictly between 0 and 1, not {level}")
    if not labels > 0 or not n_cal >= 1:
        raise DataError(f"a threshold needs labels and calibration rows, not {labels} and {n_cal}")
    n = n_cal + 2
    spread = math.sqrt(level * (1 - level) * (1 / labels + 1 / n))
    return level - margin * spread - lean(margin) * (2 * level - 1) * (1 / labels + 2 / n)


def lean(margin: float) -> float:
    """What Cornish & Fisher multiply a skewness with, ``(z^2 - 1) / 6``."""
    return (margin**2 - 1) / 6
