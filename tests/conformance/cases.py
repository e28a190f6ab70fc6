"""One builder a registered name: cached rows that suit it, and how to fit it on them.

A name that is registered and missing here fails the suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from posthoc import registry
from posthoc.contract import Features, LinearHead, State, Task

N, D = 400, 12


@dataclass(frozen=True)
class Case:
    """A registered module or score with a task it claims."""

    name: str
    task: Task

    @property
    def page(self) -> ModuleType:
        return registry.page(self.name)

    def width(self) -> int:
        return 4 if self.task == "classification" else 2

    def head(self) -> LinearHead:
        rng = np.random.default_rng(0)
        return LinearHead(rng.normal(size=(self.width(), D)), rng.normal(size=self.width()))

    def rows(self, n: int = N, seed: int = 1, dtype: Any = np.float32) -> Features:
        """Features, outputs and labels that a frozen head over them would meet."""
        rng = np.random.default_rng(seed)
        head = self.head()
        phi = rng.normal(size=(n, D)).astype(dtype)
        z = (phi.astype(np.float64) @ head.weight.T + head.bias).astype(dtype)
        if self.task == "classification":
            y: Any = (z.astype(np.float64) / 2 + rng.gumbel(size=z.shape)).argmax(1)
        else:
            y = z.astype(np.float64) + rng.normal(size=z.shape)
        return Features(phi, z, y)

    def empty(self) -> Any:
        if self.name in registry.MODULES:
            return self.page.init(self.head(), self.task)
        return self.page.init(self.width(), D)

    def fit(self, *batches: Features) -> State:
        stats = self.empty()
        for batch in batches:
            stats = self.page.update(stats, batch)
        return self.finish(stats)

    def finish(self, stats: Any) -> State:
        state: State = self.page.finish(stats, self.head())
        return state

    def apply(self, state: State, rows: Features) -> np.ndarray:
        """What the fitted page says of rows: N numbers or more, float64."""
        if self.name in registry.MODULES:
            spread = self.page.spread(state, rows.phi)
            return np.concatenate(
                [spread.variance.reshape(len(rows), -1), spread.amplitude @ spread.directions], 1
            )
        return np.asarray(self.page.score(state, rows.phi, rows.z))[:, None]

    def __str__(self) -> str:
        return f"{self.name}-{self.task}"


BUILDERS = {"laplace", "gen", "rmds", "mahalanobis"}
CASES = [
    Case(name, task)
    for name in (*registry.MODULES, *registry.SCORES)
    for task in registry.info(name).tasks
]


def take(rows: Features, index: Any) -> Features:
    """Some of the rows."""
    return Features(
        None if rows.phi is None else rows.phi[index],
        rows.z[index],
        None if rows.y is None else rows.y[index],
    )
