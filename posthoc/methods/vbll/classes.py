"""Gaussian classes with uncertain means, in coordinates where a class has unit covariance.

u | c ~ N(mu_c, I) and mu_c ~ N(0, prior I) over D coordinates: with n_c rows of mean M_c the
posterior is N(s_c M_c, v_c I) with v_c = 1 / (n_c + 1 / prior) and s_c = n_c v_c, and the evidence
of the prior variance is maximal at (sum_c |s_c M_c|² + D v_c) / (C D).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, I64

STEPS = 100
PRIORS = (1e-4, 1e4)  # the range of a learned prior variance


@dataclass(frozen=True, slots=True)
class Classes:
    """The posterior of K class means, of which there are ``counts`` K rows."""

    counts: F64
    prior: float

    @property
    def variance(self) -> F64:
        """v K: the posterior variance of a class mean in each coordinate."""
        return np.asarray(1.0 / (self.counts + 1.0 / self.prior))

    @property
    def shrink(self) -> F64:
        """s K: the posterior mean of a class in units of its rows' mean."""
        return np.asarray(self.counts * self.variance)

    @property
    def log_prior(self) -> F64:
        """Log shares K of the classes."""
        return np.asarray(np.log(self.counts / self.counts.sum()))


def posterior(counts: I64, norms: F64, d: int, prior: float | None) -> Classes:
    """The posterior for |M_c|² ``norms`` K; a prior variance that is None is learned, by MacKay's
    form of its update."""
    n = counts.astype(np.float64)
    if prior is not None:
        return Classes(n, prior)
    here = Classes(n, min(max(float(norms.mean()) / d, PRIORS[0]), PRIORS[1]))
    for _ in range(STEPS):
        known = d * float(here.shrink.sum())
        new = float((here.shrink**2 * norms).sum()) / known
        here = Classes(n, min(max(new, PRIORS[0]), PRIORS[1]))
    return here


def scores(squares: F64, variance: F64, log_prior: F64, d: int) -> F64:
    """log N(u; m_c, (1 + v_c) I) + log prior_c, N×K, for squared distances N×K from the means m_c;
    without the constant of 2 pi."""
    total = 1.0 + variance
    return np.asarray(log_prior - 0.5 * (squares / total + d * np.log(total)))


def left_out_scores(u: F64, y: I64, means: F64, classes: Classes, kept: float) -> F64:
    """Scores N×K of rows u with classes y, each as if the row had not been among the rows.

    ``means`` K×D are the M_c. Its own class loses the row, and so does the pooled covariance, which
    holds t = u - M_y with the weight n_y / (n_y - 1) / N, times the share ``kept`` of shrinkage: by
    Sherman and Morrison a squared length |e|² becomes |e|² + b (e't)² / (1 - b |t|²).
    """
    n, rows, d = classes.counts, np.arange(len(y)), u.shape[1]
    t = u - means[y]
    mine, left = n[y], n[y] - 1.0 + 1.0 / classes.prior
    mean = classes.shrink[:, None] * means
    squares = ((u**2).sum(1)[:, None] - 2.0 * (u @ mean.T)) + (mean**2).sum(1)
    leaned = (u * t).sum(1)[:, None] - t @ mean.T
    own = u - (mine[:, None] * means[y] - u) / left[:, None]
    squares[rows, y] = (own**2).sum(1)
    leaned[rows, y] = (own * t).sum(1)
    # A row alone in its class is its own mean: t = 0, and the covariance loses nothing.
    b = kept * mine / (np.maximum(mine - 1.0, 1.0) * n.sum())
    squares += (b / (1.0 - b * (t**2).sum(1)))[:, None] * leaned**2
    variance = np.tile(classes.variance, (len(y), 1))
    variance[rows, y] = 1.0 / left
    return scores(squares, variance, classes.log_prior, d)
