"""Mini-batches, Adam, the prior variance and the weight of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from posthoc.contract import F64, Features
from posthoc.rows import Rows, join, take

Objective = Literal["elbo", "de_elbo"]

WINDOW = 8192  # rows that are shuffled together
LEAST_STEPS, LEAST_EPOCHS = 600, 10
# The range of a learned prior variance of an output at a typical row. Below the least nothing moves
# that anyone could see; rows that say nothing against the prior mean drive it there.
PRIOR_SCALES = (1e-4, 1e4)
GROWTH = 3.0  # of the prior variance, at most, from one epoch to the next
BETAS, TINY = (0.9, 0.999), 1e-10


def emphasis(objective: Objective, weights: int, n: int) -> float:
    """kappa >= 1: the number of times that the data count, or 1 over the weight of the divergence.

    The data-emphasised ELBO sets kappa = weights / rows where there are more weights than rows
    (Harvey, Petrov & Hughes 2025, "Learning hyperparameters via a data-emphasized variational
    objective", arXiv:2502.01861); a divergence over many more weights than rows otherwise
    outweighs what the rows say, and the learned prior variance is too small.
    """
    return 1.0 if objective == "elbo" else max(1.0, weights / n)


def epochs_for(n: int, batch_size: int) -> int:
    """At least `LEAST_STEPS` steps and `LEAST_EPOCHS` epochs."""
    return max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / steps(n, batch_size)))


def steps(n: int, batch_size: int) -> int:
    """Mini-batches of an epoch."""
    whole, rest = divmod(n, WINDOW)
    return whole * math.ceil(WINDOW / batch_size) + math.ceil(rest / batch_size)


def learned_prior(prior: float, mean: F64, trace: float, unit: float) -> float:
    """The next tau² from the last, the means of all D weights and tr S: |m|² / (D - tr S / tau²),
    which is MacKay's form of (|m|² + tr S) / D; in a range of ``unit``."""
    free = max(mean.size - trace / prior, 1e-9 * mean.size)
    new = float((mean**2).sum()) / free
    new = min(max(new, prior / GROWTH), prior * GROWTH)
    return min(max(new, PRIOR_SCALES[0] * unit), PRIOR_SCALES[1] * unit)


def batches(rows: Rows, rng: np.random.Generator, size: int) -> Iterator[Features]:
    """One epoch of mini-batches of at most ``size`` rows, nearly equal, in random order within
    windows of `WINDOW` rows. Unlike `Rows.shuffled` they do not depend on how the rows are cut
    into blocks."""
    for window in _windows(rows):
        order = rng.permutation(len(window))
        for index in np.array_split(order, math.ceil(len(window) / size)):
            yield take(window, index)


def _windows(rows: Rows) -> Iterator[Features]:
    held: list[Features] = []
    count = 0
    for block in rows:
        at = 0
        while at < len(block):
            piece = take(block, slice(at, at + WINDOW - count))
            held.append(piece)
            at, count = at + len(piece), count + len(piece)
            if count == WINDOW:
                yield join(held)
                held, count = [], 0
    if held:
        yield join(held)


class Adam:
    """Ascent on an array in place (Kingma & Ba 2015, arXiv:1412.6980), the learning rate falling to
    zero along half a cosine over ``total`` steps."""

    def __init__(self, parameter: F64, learning_rate: float, total: int):
        self._parameter = parameter
        self._rate, self._total, self._step = learning_rate, total, 0
        self._first, self._second = np.zeros_like(parameter), np.zeros_like(parameter)

    def step(self, gradient: F64) -> None:
        """One step along the gradient, which is overwritten."""
        (a, b), first, second = BETAS, self._first, self._second
        rate = self._rate * 0.5 * (1.0 + math.cos(math.pi * self._step / self._total))
        self._step += 1
        first *= a
        first += (1.0 - a) * gradient
        second *= b
        np.square(gradient, out=gradient)
        gradient *= 1.0 - b
        second += gradient
        np.multiply(second, 1.0 / (1.0 - b**self._step), out=gradient)
        np.sqrt(gradient, out=gradient)
        gradient += TINY
        np.divide(first, gradient, out=gradient)
        gradient *= rate / (1.0 - a**self._step)
        self._parameter += gradient
