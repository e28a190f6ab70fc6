"""BOCD: Bayesian online change points of a Gaussian with unknown mean and variance.

Adams & MacKay 2007, arXiv:0710.3742, with the conjugate normal-inverse-gamma model (Murphy 2007,
"Conjugate Bayesian analysis of the Gaussian distribution", section 6), whose predictive is a
Student-t. Plain BOCD takes outliers for changes; ``contamination=0.05, clip=5, hazard=1/1000,
least=5`` mends most of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from calibration.drift import run_length
from calibration.drift.detector import Found
from calibration.drift.run_length import Settings, State
from calibration.drift.run_length_json import SavedState, dump, load
from calibration.drift.standardise import FARTHEST, RELEARN, Observation, reference_of
from posthoc.contract import F64, Array

NAME = "bocd"


@dataclass(frozen=True, slots=True)
class Model:
    """Statistics a dimension, S = 2: the posterior's mean and its rate ``beta``.

    With n observations kappa = kappa_0 + n and alpha = alpha_0 + n/2.
    """

    mean: float = 0.0
    kappa: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0

    def prior(self) -> F64:
        return np.array((self.mean, self.beta))

    def updated(self, stats: F64, lengths: Array, z: F64) -> F64:
        kappa = (self.kappa + lengths)[:, None]
        away = z - stats[..., 0]
        new = np.empty_like(stats)
        new[..., 0] = stats[..., 0] + away / (kappa + 1)
        new[..., 1] = stats[..., 1] + away * away * kappa / (2 * (kappa + 1))
        return new

    def log_density(self, stats: F64, lengths: Array, z: F64) -> F64:
        kappa, alpha = (self.kappa + lengths)[:, None], (self.alpha + lengths / 2)[:, None]
        away = z - stats[..., 0]
        spread = 2 * stats[..., 1] * (kappa + 1) / kappa  # degrees of freedom times scale²
        return np.asarray(
            gammaln(alpha + 0.5)
            - gammaln(alpha)
            - 0.5 * np.log(np.pi * spread)
            - (alpha + 0.5) * np.log1p(away * away / spread)
        )

    def holds(self, stats: F64) -> bool:
        return self == Model() and bool((stats[..., 1] > 0).all())


def start(
    reference: Array,
    *,
    hazard: float | Sequence[float] = 1 / 200,
    keep: int = 50,
    contamination: float = 0.0,
    broad: float = 10.0,
    clip: float = FARTHEST,
    least: int = 7,
    recent: int = 50,
    threshold: float = 0.99,
    relearn: int = RELEARN,
) -> State[Model]:
    """The state after a reference of N or N×D points, which is its first segment.

    ``hazard``: the chance that a segment ends, or one for each of its lengths from 1, the last
    also for longer ones. The rest as in `run_length.Settings`. Raises DataError as
    `run_length.begin`.
    """
    settings = Settings(
        keep, float(contamination), float(broad), float(clip), least, recent, threshold, relearn
    )
    return run_length.begin(_fit, reference_of(reference), settings, hazard)


def step(state: State[Model], x: Observation) -> tuple[State[Model], Found]:
    """The state after one more observation (a number, or D), and what it showed.

    Raises DataError for NaN and infinity.
    """
    return run_length.step(state, x, _fit)


class _Saved(SavedState[Model]):
    pass


def to_json(state: State[Model]) -> str:
    """The state as one JSON object."""
    return dump(_Saved, NAME, state)


def from_json(text: str) -> State[Model]:
    """The inverse of `to_json`. Raises DataError for anything else."""
    return load(_Saved, NAME, text)


def _fit(z: F64) -> Model:
    del z
    return Model()
