"""Gaussian classes with uncertain means, in coordinates where a class has about unit covariance.

u | c ~ N(mu_c, noise I) and mu_c ~ N(0, prior I) over D coordinates: with n_c rows of mean M_c the
posterior is N(s_c M_c, v_c I) with s_c = n_c / (n_c + noise / prior) and v_c = s_c noise / n_c, and
the prior variance has the closed form (sum_c |s_c M_c|² + D v_c) / (C D).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, I64

STEPS = 100
PRIORS = (1e-4, 1e4)  # the range of a learned prior variance


@dataclass(frozen=True, slots=True)
class Classes:
    """The posterior of K class means: ``noise`` and ``prior`` variance, ``counts`` K of rows."""

    counts: F64
    noise: float
    prior: float

    def ridge(self) -> float:
        """The rows that the prior is worth."""
        return self.noise / self.prior

    def shrink(self) -> F64:
        """s K: the posterior mean of a class in units of its rows' mean."""
        return self.counts / (self.counts + self.ridge())

    def variance(self) -> F64:
        """v K: the posterior variance of a class mean in each coordinate."""
        return self.noise / (self.counts + self.ridge())


def posterior(counts: I64, norms: F64, d: int, noise: float, prior: float | None) -> Classes:
    """The posterior for a noise variance; ``norms`` K are the |M_c|², and the prior variance is
    learned where it is None (in MacKay's form of its update)."""
    n = counts.astype(np.float64)
    if prior is not None:
        return Classes(n, noise, prior)
    here = Classes(n, noise, min(max(float(norms.mean()) / d, PRIORS[0]), PRIORS[1]))
    for _ in range(STEPS):
        known = d * float(here.shrink().sum())  # D C - sum_c D v_c / prior
        new = float((here.shrink() ** 2 * norms).sum()) / known
        here = Classes(n, noise, min(max(new, PRIORS[0]), PRIORS[1]))
    return here


@dataclass(frozen=True, slots=True)
class Products:
    """Of N rows u with classes y and K means M: |u|² N, u M' N×K, |M|² K, and with t = u - M_y also
    u't N, M t N×K and |t|² N."""

    square: F64
    along: F64
    norms: F64
    own: F64
    across: F64
    inside: F64


def products(u: F64, y: I64, means: F64) -> Products:
    """All that a leave-one-out loss needs of a block."""
    t = u - means[y]
    return Products(
        (u**2).sum(1),
        u @ means.T,
        (means**2).sum(1),
        (u * t).sum(1),
        t @ means.T,
        (t**2).sum(1),
    )


def left_out_scores(found: Products, y: I64, classes: Classes, d: int, kept: float) -> F64:
    """Scores N×K, each row's as if it had not been among the rows: log N(u; mean_c, v_c + noise) +
    log prior_c without constants.

    Its own class loses it, and so does the pooled covariance, which holds it with the weight
    n_y / (n_y - 1) / N, times the share ``kept`` of shrinkage: by Sherman-Morrison a squared length
    |e|² becomes |e|² + b (e't)² / (1 - b |t|²).
    """
    n, rows = classes.counts, np.arange(len(y))
    s, v = classes.shrink(), classes.variance()
    squares = found.square[:, None] - 2.0 * s * found.along + s**2 * found.norms
    leaned = found.own[:, None] - s * found.across
    mine, left = n[y], n[y] - 1.0 + classes.ridge()
    all_, part = (mine + classes.ridge()) / left, mine / left
    along = found.along[rows, y]
    squares[rows, y] = all_**2 * found.square - 2.0 * all_ * part * along + part**2 * found.norms[y]
    leaned[rows, y] = all_ * found.own - part * found.across[rows, y]
    # A row alone in its class is its own mean, so that t = 0 and nothing is lost.
    b = kept * mine / (np.maximum(mine - 1.0, 1.0) * n.sum())
    squares += (b / (1.0 - b * found.inside))[:, None] * leaned**2
    total = np.tile(v + classes.noise, (len(y), 1))
    total[rows, y] = classes.noise / left + classes.noise
    log_prior = np.log(n / n.sum())
    return np.asarray(log_prior - 0.5 * (squares / total + d * np.log(total)))
