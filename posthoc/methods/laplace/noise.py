"""Noise variance of a regression's outputs, with the precision of the prior.

MacKay's two updates alternate: the precision is gamma / |theta|² and the noise of an output its
squared error over rows minus effective parameters (Bishop 2006, PRML 3.5.2). Each output has its
own noise; the curvature of output k is ``mu / noise_k`` with mu the spectrum of the features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from posthoc.contract import F64, Array, Features, FitError
from posthoc.methods.laplace.criteria import Said, choose_regression, said
from posthoc.methods.laplace.prior import MAX_STEPS, PRECISION_BOUNDS
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
    noise, d = mean_square(errors), precision or 1.0
    if norm == 0.0 and precision is None:
        raise FitError("the head's weights are all zero; give prior_precision")
    for step in range(1, MAX_STEPS + 1):
        h = np.divide.outer(mu, noise)
        gamma = (h / (h + d)).sum(0)
        new = precision or float(np.clip(gamma.sum() / norm, *PRECISION_BOUNDS))
        left = np.maximum(errors.n - (0.0 if fresh else gamma), 1.0)
        found = errors.squared / left
        if abs(new - d) <= 1e-10 * d and np.allclose(found, noise, rtol=1e-10, atol=0):
            return new, found, step
        d, noise = new, found
    return d, noise, MAX_STEPS


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
