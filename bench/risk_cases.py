"""Losses and answers of known risk, for ``python -m bench risk``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from bench.suite import load
from posthoc.contract import F64, Array
from posthoc.links import softmax

GENERATOR, SETS = "generator", ("magika", "satimage")
LEVEL = 0.1  # of the generator
LEVELS = {"magika": 0.05, "satimage": 0.1}
F1_LEVELS = {"magika": (0.1, 0.16), "satimage": (0.13, 0.18)}  # both ends exceed the first
LEAST = {"magika": 0.01, "satimage": 0.001}  # probability at which a set ends
PARTS = 8  # of an item
FARTHER = 16.0  # times as large are the scores of parts that should stay out
SPREAD = 0.8  # of the logarithm of an item's difficulty
SIZES: F64 = np.concatenate(  # thresholds of the generator, fine where risks pass the level
    [np.geomspace(0.05, 0.95, 12), np.geomspace(1, 6, 110), np.geomspace(6.5, 20, 8)]
)
PROBABILITIES: F64 = np.concatenate(  # thresholds of a set, the strictest first
    [np.linspace(0.9999, 0.905, 20), np.linspace(0.9, 0.05, 60), np.geomspace(0.049, 0.001, 40)]
)

Draw = Callable[[np.random.Generator, int], Array]


@dataclass(frozen=True, slots=True)
class Case:
    """A loss of known risk at each setting: ``draw(rng, n)`` gives n items' losses n×L."""

    source: str
    loss: str
    level: float
    draw: Draw
    risk: F64
    falls: bool = True
    binary: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """Rows with a confidence and whether the label is wrong; ``error(t)`` is the true P(wrong |
    confidence > t)."""

    source: str
    level: float
    draw: Callable[[np.random.Generator, int], tuple[F64, Array]]
    error: Callable[[float], float]


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
DIFFICULTIES, WEIGHTS = np.exp(SPREAD * NODES), WEIGHTS / WEIGHTS.sum()


def part_risk(threshold: float | F64) -> F64:
    """The true share of parts above each threshold, by quadrature over difficulties."""
    ratio = np.multiply.outer(np.atleast_1d(threshold), 1 / DIFFICULTIES)
    return np.asarray(2 * ndtr(-ratio) @ WEIGHTS)


def parts(rng: np.random.Generator, n: int, size: int = PARTS) -> Array:
    """Scores |N(0, d²)| of the parts of n items, n×size, d log-normal."""
    difficulty = np.exp(SPREAD * rng.standard_normal((n, 1)))
    return np.asarray(np.abs(rng.standard_normal((n, size))) * difficulty)


def generator() -> tuple[list[Case], list[Answers]]:
    """Losses of parts of items, and answers that are right with probability their confidence."""

    def miss(rng: np.random.Generator, n: int) -> Array:
        return parts(rng, n, 1) > SIZES

    def misses(rng: np.random.Generator, n: int) -> Array:
        return np.asarray((parts(rng, n)[:, :, None] > SIZES).mean(axis=1))

    def two_sided(rng: np.random.Generator, n: int) -> Array:
        taken = FARTHER * parts(rng, n)[:, :, None] <= SIZES
        return np.asarray(misses(rng, n) / 2 + taken.mean(axis=1) / 2)

    def answers(rng: np.random.Generator, n: int) -> tuple[F64, Array]:
        sure = rng.uniform(size=n)
        return sure, rng.uniform(size=n) > sure

    risk = part_risk(SIZES)
    both = risk / 2 + (1 - part_risk(SIZES / FARTHER)) / 2
    cases = [
        Case(GENERATOR, "miss", LEVEL, miss, risk, binary=True),
        Case(GENERATOR, "misses", LEVEL, misses, risk),
        *(Case(GENERATOR, "two_sided", v, two_sided, both, falls=False) for v in (0.2, 0.45)),
    ]
    # E[1 - c | c > t] for c uniform.
    return cases, [Answers(GENERATOR, LEVEL, answers, lambda t: (1 - max(t, 0.0)) / 2)]


def pool(name: str) -> tuple[list[Case], list[Answers]]:
    """Losses and answers of all rows of a set, drawn one by one."""
    material = load(name, grouped=False).material
    rows = material.features(material.usable)
    y, p = np.asarray(rows.y, np.int64), softmax(rows.z)
    own = p[np.arange(len(y)), y]
    least = PROBABILITIES[LEAST[name] <= PROBABILITIES]
    miss = own[:, None] < least
    ascending = np.sort(p, axis=1)
    size = p.shape[1] - np.stack([np.searchsorted(row, least) for row in ascending])
    f1 = np.where(miss, 1.0, 1 - 2 / (1 + size))

    def draw_from(table: Array, parts: int = 1) -> Draw:
        def draw(rng: np.random.Generator, n: int) -> Array:
            taken = table[rng.integers(len(table), size=n * parts)]
            return taken if parts == 1 else taken.reshape(n, parts, -1).mean(axis=1)

        return draw

    risk = miss.mean(axis=0)
    level = LEVELS[name]
    cases = [
        Case(name, "miss", level, draw_from(miss), risk, binary=True),
        Case(name, "misses", level, draw_from(miss, PARTS), risk),
        *(Case(name, "f1", v, draw_from(f1), f1.mean(0), falls=False) for v in F1_LEVELS[name]),
    ]
    sure, wrong = p.max(axis=1), p.argmax(axis=1) != y
    order = np.argsort(-sure, kind="stable")
    errors = np.cumsum(wrong[order])

    def error(t: float) -> float:
        above = int(np.searchsorted(-sure[order], -t, side="left"))
        return float(errors[above - 1] / above) if above else 0.0

    def answers(rng: np.random.Generator, n: int) -> tuple[F64, Array]:
        taken = rng.integers(len(y), size=n)
        return sure[taken], wrong[taken]

    return cases, [Answers(name, level / 2, answers, error)]
