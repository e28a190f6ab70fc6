"""How often alerts on calibration and coverage fire though nothing is wrong."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri

from service.alerting.options import Options, seconds

MONTH = 30 * 86_400.0
_PATHS = 300_000


def expected_false_pages(
    options: Options,
    *,
    classifiers: int = 1,
    regressors: int = 0,
    levels: int = 1,
    streams: int = 0,
    observations: float = 0.0,
    alarms_per_1000: float = 0.01,
) -> dict[str, float]:
    """Expected false alarms a month by alert, over models × levels × streams × ``alert_windows``.

    Every model is healthy and gets at least ``min_labels`` labels in every window; a regressor has
    no ECE. Coverage counts when it stays below its margin for ``for_``; ECE is taken at
    ``ece_tolerance`` above its floor with the fewest labels, whose noise is greatest. Both are in
    the normal approximation of `firings`. The law of coverage itself, beta-binomial, is skewed, and
    the margin counts that: below it lies 0.2 to 1.4 times what lies below three standard deviations
    of a normal (levels 0.8 to 0.995, 200 to 5,000 labels, 500 or 1,000 conformal rows; see
    `calibration.drift.alert`). ECE in a single bin is half-normal; beyond three standard deviations
    its tail is 7 times the normal's, and ``ece_tolerance`` is on top. Calibration noise is drawn
    once a bundle, not anew each window, which only makes alarms fewer.

    ``streams`` (of all models) give the monitor's detector ``observations`` a month each (one for
    ten predictions), of which ``alarms_per_1000`` alarm. Others are errors of all time rather than
    of a month, to be added up: ``UQNotExchangeable`` has ``10**-drift_evidence`` for each stream;
    ``UQCoverageBroken`` at most 0.025 for each model and level whose bundle covers its level less
    ``coverage_tolerance``; and in its place, where the monitor knows the bundle,
    ``UQCoverageBelowPromise`` at most 0.05 for each model and level, as has
    ``UQAccuracyBelowPromise`` for each classifier (`service.monitor.promises`).
    """
    tolerance = options.ece_tolerance / math.sqrt((1 - 2 / math.pi) * 0.25 / options.min_labels)
    models, windows = classifiers + regressors, options.alert_windows
    z = options.margin
    coverage = sum(firings(options, w, z) for w in windows)
    ece = sum(firings(options, w, z + tolerance) for w in windows) if classifiers else 0.0
    return {
        "UQCoverageLow": models * levels * coverage,
        "UQCalibrationDegraded": classifiers * ece,
        "UQDriftDetected": streams * observations * alarms_per_1000 / 1000,
    }


@lru_cache
def firings(options: Options, window: str, z: float) -> float:
    """Expected times a month that the standardised mean of a sliding window stays ``z`` standard
    deviations off for ``for_``, judged every ``interval``.

    Means over windows that overlap by all but a time t have correlation 1 - t / window. An alarm
    that fires is a run of k = for_ / interval + 1 evaluations beyond z with none before, so of each
    evaluation there are P(k beyond) - P(k + 1 beyond): from paths that begin beyond z and are
    followed until they leave (fixed seed). A ``for_`` of the window or longer counts as the window.
    """
    every, length = seconds(options.interval), seconds(window)
    k = math.ceil(seconds(options.for_) / every) + 1
    steps = min(k, max(1, math.ceil(length / every) - 1))
    rng = np.random.default_rng(0)
    tail = float(ndtr(-z))
    old = -ndtri(tail * (1 - rng.random(_PATHS)))  # what is left of the window's labels then
    new, left, share, stays = np.zeros(_PATHS), 1.0, every / length, [1.0]
    for _ in range(steps):
        # The labels that leave, given the sum of those that are left: a normal's conditional law.
        part = share / left
        leaving = part * old + rng.normal(size=len(old)) * math.sqrt(share * (1 - part))
        old, left = old - leaving, left - share
        new = new + rng.normal(size=len(new)) * math.sqrt(share)
        beyond = old + new > z
        old, new = old[beyond], new[beyond]
        stays.append(len(old) / _PATHS)
    return MONTH / every * tail * (stays[-2] - stays[-1])
