"""Gaussian classes with uncertain means: scores, their variance, and the bound with its gradients.

Everything is in coordinates u N×D in which the classes have about unit variance: u | c ~ N(mu_c,
diag(noise)), q(mu_c) = N(mean_c, diag(variance_c)), for K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, I64
from posthoc.folds import log_softmax


@dataclass(slots=True)
class Classes:
    """Means K×D, the logarithms of their variances K×D and of the noise variance D, log prior
    probabilities K, the prior variance of a mean, and how often the data count."""

    mean: F64
    log_variance: F64
    log_noise: F64
    log_prior: F64
    prior: float
    emphasis: float

    @property
    def variance(self) -> F64:
        """Variances K×D of the means."""
        return np.asarray(np.exp(self.log_variance))

    @property
    def noise(self) -> F64:
        """Variances D within a class."""
        return np.asarray(np.exp(self.log_noise))

    def divergence(self) -> float:
        """KL(q || prior) in nats."""
        squares = float((self.mean**2).sum() + self.variance.sum())
        of_one = squares / self.prior + self.mean.size * (np.log(self.prior) - 1.0)
        return float(0.5 * (of_one - self.log_variance.sum()))


def scores(mean: F64, variance: F64, noise: F64, log_prior: F64, u: F64) -> F64:
    """log N(u; mean_c, variance_c + noise) + log prior_c, N×K, without the constant of 2 pi."""
    inverse = 1.0 / (variance + noise)
    constant = (mean**2 * inverse - np.log(inverse)).sum(1)
    square = u**2 @ inverse.T - 2.0 * (u @ (mean * inverse).T) + constant
    return np.asarray(log_prior - 0.5 * square)


def score_variance(mean: F64, variance: F64, noise: F64, u: F64) -> F64:
    """Variance N×K of log N(u; mu_c, noise) under q."""
    gain = variance / noise**2
    constant = (mean**2 * gain + 0.5 * (variance / noise) ** 2).sum(1)
    found = u**2 @ gain.T - 2.0 * (u @ (mean * gain).T) + constant
    return np.asarray(np.maximum(found, 0.0))


def bound(q: Classes, u: F64, y: I64) -> float:
    """The sum over rows of the lower bound of E[log p(y | u)], for class indices y N below K."""
    s = scores(q.mean, q.variance, q.noise, q.log_prior, u)
    return float((_joint(q, u, y) - _log_sum_exp(s)).sum())


def gradients(q: Classes, u: F64, y: I64, share: float) -> tuple[F64, F64, F64]:
    """Of the bound of these rows minus their share of the divergence, a row: by mean, log variance
    and log noise."""
    n, k = len(u), len(q.mean)
    mean, variance, noise = q.mean, q.variance, q.noise
    total = variance + noise
    p = np.exp(log_softmax(scores(mean, variance, noise, q.log_prior, u)))
    own = np.zeros((n, k))
    own[np.arange(n), y] = 1.0
    squares = u**2
    by_mean, near = _moments(own, u, squares, mean)
    own_count = own.sum(0)[:, None]
    far_mean, far = _moments(p, u, squares, mean)
    spreading = 0.5 * (p.sum(0)[:, None] - far / total) / total
    by_mean = by_mean / noise - far_mean / total - (share / (q.emphasis * q.prior)) * mean
    by_variance = spreading - 0.5 * own_count / noise
    by_variance -= (0.5 * share / q.emphasis) * (1.0 / q.prior - 1.0 / variance)
    inside = near.sum(0) + (own_count * variance).sum(0)
    by_noise = spreading.sum(0) - 0.5 * (n - inside / noise) / noise
    return by_mean / n, by_variance * variance / n, by_noise * noise / n


def _moments(weight: F64, u: F64, squares: F64, mean: F64) -> tuple[F64, F64]:
    """For weights N×K, each K×D: the weighted sums of u - mean and of its squares."""
    count, first = weight.sum(0)[:, None], weight.T @ u
    return first - count * mean, weight.T @ squares - mean * (2.0 * first - count * mean)


def _joint(q: Classes, u: F64, y: I64) -> F64:
    """E_q[log N(u; mu_y, noise)] + log prior_y, N, without the constant of 2 pi."""
    noise = q.noise
    squares = (u - q.mean[y]) ** 2 + q.variance[y]
    return np.asarray(q.log_prior[y] - 0.5 * (squares / noise + q.log_noise).sum(1))


def _log_sum_exp(s: F64) -> F64:
    return np.asarray(s[:, 0] - log_softmax(s)[:, 0])
