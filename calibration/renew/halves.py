"""Whether the rows of a renewal are of one kind: their older half beside the newer one.

New thresholds hold for rows like those that they were ranked on. Where something changed within the
window, these are rows of before and of after together, and what is promised holds for no rows that
will come. Halves whose conformal scores have distributions D apart (Kolmogorov-Smirnov: the largest
difference of their distribution functions) are covered unlike by up to D at one and the same
threshold, so D is in units of coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

from calibration.renew.measure import Level, figures
from calibration.renew.rows import LEAST, Labelled, drawn
from calibration.renew.thresholds import Ranked, true_scores
from posthoc.contract import Array

CHANCE = 0.001  # halves that are alike are called unlike in so many renewals
LITTLE = 0.02  # a distance that moves no coverage by more, which nobody need hear of


@dataclass(frozen=True, slots=True)
class Halves:
    """The older and the newer half of the conformal and the measured rows, as the new bundle serves
    them: how far the distributions of their conformal scores are apart, with the p-value of that,
    and coverage by level among the measured rows of each."""

    rows: int
    distance: float
    pvalue: float
    older: tuple[Level, ...]
    newer: tuple[Level, ...]

    @property
    def unlike(self) -> bool:
        """Whether they are further apart than chance has them, and than makes no difference."""
        return self.pvalue < CHANCE and self.distance > LITTLE


def halves(made: Ranked, conformal: Labelled, measured: Labelled, seed: int) -> Halves | None:
    """Rows of a renewal by the half of their time; None where it is not known, or where a half of
    the measured rows has fewer than LEAST."""
    if conformal.time is None or measured.time is None:
        return None
    time = np.concatenate([conformal.time, measured.time])
    newer = time > np.median(time)
    late = newer[len(conformal) :]
    if min(late.sum(), (~late).sum()) < LEAST:
        return None
    score = np.concatenate(
        [true_scores(made.head, rows, drawn(rows, seed)) for rows in (conformal, measured)]
    )
    found = ks_2samp(score[~newer], score[newer])
    older, recent = (_levels(made, measured.take(which), seed) for which in (~late, late))
    return Halves(len(score), float(found.statistic), float(found.pvalue), older, recent)


def _levels(made: Ranked, rows: Labelled, seed: int) -> tuple[Level, ...]:
    key = "set" if rows.label is not None else "interval"
    ranked: Array = made.scores[key]
    guarantees = made.conformal.guarantees
    return figures(made.head, guarantees, ranked, rows, drawn(rows, seed), None).levels


def warning(found: Halves) -> str:
    """What is wrong with rows whose halves are unlike, and what to do."""
    levels = "; ".join(
        f"at {new.level} it covers {new.coverage:.4f} of the newer and {old.coverage:.4f} of the "
        "older"
        for old, new in zip(found.older, found.newer, strict=True)
    )
    return (
        f"Renewed on rows whose older half is unlike the newer: their conformal scores are "
        f"{found.distance:.3f} apart (Kolmogorov-Smirnov, p {found.pvalue:.2g}). Of rows used for "
        f"nothing else, {levels}. If something changed within this time, rows of before are among "
        "these: let --since reach back no further than the change."
    )
