"""Training with early stopping, and the map from a ranking to a widening."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from posthoc.contract import F64, Array, Features
from posthoc.methods.loss.perceptron import AdamW, backward, forward, start
from posthoc.rows import BLOCK, Rows, join, take

LONGEST = 200  # steps between two looks at the held-out rows
SMALLEST = 1e-6  # a decrease that counts
PRIOR = 4.0  # precision of the map's coefficients

Batch = tuple[Array, Any]  # inputs N×J, and what the objective compares the output with
Objective = Callable[[Array, Any], tuple[float, F64]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of the layers and the settings of the descent."""

    sizes: tuple[int, ...]
    learning_rate: float
    weight_decay: float
    batch_size: int
    steps: int
    patience: int
    seed: int


def train(
    rows: Rows,
    held: list[Batch],
    batch: Callable[[Features], Batch],
    objective: Objective,
    recipe: Recipe,
) -> tuple[list[Array], int, float]:
    """(parameters, steps taken to them, objective on the held-out batches) of the best look."""
    rng = np.random.default_rng(recipe.seed)
    parameters = start(recipe.sizes, rng)
    descent = AdamW(parameters, recipe.learning_rate, recipe.weight_decay)
    period = min(LONGEST, -(-rows.n // recipe.batch_size))
    best, at, value, misses = (
        [p.copy() for p in parameters],
        0,
        _look(parameters, held, objective),
        0,
    )
    for step, block in enumerate(_endless(rows, rng, recipe), 1):
        x, target = batch(block)
        layers = forward(parameters, x)
        _, gradient = objective(layers[-1], target)
        descent.step(backward(parameters, layers, gradient.astype(np.float32)))
        if step % period:
            continue
        new = _look(parameters, held, objective)
        misses += 1
        if new < value - SMALLEST:
            best, at, value, misses = [p.copy() for p in parameters], step, new, 0
        if misses == recipe.patience:
            break
    return best, at, value


def fit_map(
    columns: F64, likelihood: Callable[[F64], tuple[float, F64]], signed: int
) -> tuple[F64, float]:
    """(coefficients J, constant) of h = columns @ coefficients + constant, columns N×J
    standardised, that minimise a mean negative log-likelihood given with its gradient by h N; the
    first ``signed`` coefficients are not negative. Coefficients have a normal prior, for a
    constant h is what the strength can always have."""
    n, j = columns.shape

    def cost(w: F64) -> tuple[float, F64]:
        value, by_h = likelihood(columns @ w[:-1] + w[-1])
        shrunk = PRIOR / n * w[:-1]
        value += 0.5 * float(shrunk @ w[:-1])
        return value, np.append(by_h @ columns + shrunk, by_h.sum())

    bounds = [(0.0, None)] * signed + [(None, None)] * (j - signed) + [(-20.0, 20.0)]
    found = minimize(cost, np.zeros(j + 1), jac=True, bounds=bounds, method="L-BFGS-B").x
    return np.asarray(found[:-1]), float(found[-1])


def recut(rows: Rows, size: int = BLOCK) -> Rows:
    """The same rows in blocks of ``size``, however they were cut."""

    def blocks() -> Iterator[Features]:
        parts: list[Features] = []
        count = 0
        for block in rows:
            while len(block):
                part, block = (
                    take(block, slice(size - count)),
                    take(block, slice(size - count, None)),
                )
                parts.append(part)
                count += len(part)
                if count == size:
                    yield join(parts)
                    parts, count = [], 0
        if parts:
            yield join(parts)

    return Rows(blocks, rows.n)


def _endless(rows: Rows, rng: np.random.Generator, recipe: Recipe) -> Iterator[Features]:
    """``steps`` mini-batches, epoch after epoch."""
    left = recipe.steps
    while True:
        for block in rows.shuffled(rng, recipe.batch_size):
            if left == 0:
                return
            left -= 1
            yield block


def _look(parameters: list[Array], held: list[Batch], objective: Objective) -> float:
    values = [objective(forward(parameters, x)[-1], target)[0] for x, target in held]
    return float(np.average(values, weights=[len(x) for x, _ in held]))
