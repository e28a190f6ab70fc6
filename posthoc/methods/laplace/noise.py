"""Noise variance of a regression's outputs, with the precision of the prior.

MacKay's two updates: the precision is gamma / |theta|² and the noise of an output its squared error
over rows minus effective parameters (Bishop 2006, PRML 3.5.2). Each output has its own noise; the
curvature of output k is ``mu / noise_k`` with mu the spectrum of the features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from posthoc.contract import F64, Array, Features, FitError
from posthoc.methods.laplace.criteria import Said, choose_regression, said
from posthoc.methods.laplace.prior import CLOSE, MAX_STEPS
from posthoc.methods.laplace.settings import Curvature
from posthoc.methods.laplace.sums import Errors


def mean_square(errors: Errors) -> F64:
    """Mean squared residual of each output (K); FitError without labels, or where it is zero."""
    if errors.n == 0:
        raise FitError("a Laplace regression needs labels for the noise; name them with --target")
    if not np.all(errors.squared > 0):
        raise FitError("the model predicts the labels without error; check for leakage")
    return np.asarray(errors.squared / errors.n)


def fit_noise(
    errors: Errors, mu: F64, norm: float, precision: float | None, fresh: bool
) -> tuple[float, F64, int]:
    """(precision, noise variance K, steps); a given ``precision`` stays.

    ``fresh``: the rows are not those that the head was trained on, so that no effective parameter
    is taken off. Raises FitError without labels, or when the residuals are zero.
    """
    start = mean_square(errors)
    if norm == 0.0 and precision is None:
        raise FitError("the head's weights are all zero; give prior_precision")
    d = precision or float((np.divide.outer(mu, start)).sum() / norm) ** 0.5
    steps = 0
    while steps < MAX_STEPS:
        steps += 1
        noise = start if fresh else _noise_at(errors, mu, d)
        if precision is not None:
            break
        h = np.divide.outer(mu, noise)
        # The fixed point's right side falls in log d with a slope between 0 and -1, so that half a
        # step halves the distance at least.
        move = 0.5 * np.log(float((h / (h + d)).sum()) / (norm * d))
        if abs(move) <= CLOSE:
            break
        d *= float(np.exp(move))
    return d, noise, steps


def _noise_at(errors: Errors, mu: F64, precision: float) -> F64:
    """The noise K for a precision: the root of s (n - gamma(s)) = squared error, by Newton's method
    in log s, where the slope lies between 1 and 2 and the root is the only one."""
    noise = mean_square(errors)
    for _ in range(MAX_STEPS):
        known = mu[:, None] / (mu[:, None] + noise * precision)
        left = errors.n - known.sum(0)
        slope = 1.0 + np.where(left > 1.0, (known * (1.0 - known)).sum(0), 0.0) / left.clip(1.0)
        move = np.log(errors.squared / (noise * left.clip(1.0))) / slope
        noise = noise * np.exp(move)
        if np.abs(move).max() <= CLOSE:
            break
    return noise


def posterior(
    settings: Curvature,
    errors: Errors,
    mu: F64,
    norm: float,
    fresh: bool,
    rows: Features | None,
    squares: Callable[[Array], F64],
) -> tuple[F64, Said]:
    """(shrinkage J×K, what the state says) of a regression whose outputs share the curvature ``mu``
    (J, already scaled to the training rows) of the features that ``squares`` maps rows to."""
    if not settings.needs_held_out:
        precision, noise, steps = fit_noise(errors, mu, norm, settings.prior_precision, fresh)
        _, said_of = said(settings, precision, fixed_point_steps=steps)
    else:

        def noise_at(d: float) -> F64:
            return fit_noise(errors, mu, norm, d, fresh)[1]

        def variance(fixed: F64, d: float) -> F64:
            return fixed @ _shrinkage(mu, noise_at(d), d)

        precision, said_of = choose_regression(settings, rows, squares, noise_at, variance)
        noise = noise_at(precision)
    return _shrinkage(mu, noise, precision), {
        **said_of,
        "noise_variance": [float(v) for v in noise],
    }


def _shrinkage(mu: F64, noise: F64, precision: float) -> F64:
    return np.asarray(1.0 / (np.divide.outer(mu, noise) + precision))
