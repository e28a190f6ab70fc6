"""One builder a registered name: cached rows that suit it, and how to fit it on them.

A name that is registered and missing here fails the suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from posthoc import links, registry
from posthoc.contract import Features, LinearHead, State, Task
from posthoc.links import Spread
from posthoc.rows import Rows, take

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
        if self.name == "bayescap_image":  # the log variance of each output
            phi = (phi[:, : self.features] * 0.2).astype(dtype)
        return Features(phi, z, y)

    @property
    def features(self) -> int:
        """D, the number of features."""
        return self.width() if self.name == "bayescap_image" else D

    @property
    def module(self) -> bool:
        return self.name in registry.MODULES

    @property
    def folds(self) -> bool:
        """Whether the fit is a sum: iterative pages have a ``fit`` instead."""
        return not hasattr(self.page, "fit")

    @property
    def tolerance(self) -> float:
        """How far two fits on the same rows, blocked or ordered otherwise, may lie apart."""
        return 2e-5 if self.folds else 1e-3

    @property
    def ordered(self) -> bool:
        """Whether the fit depends on the order of rows: it samples mini-batches, draws a weight
        for each row, or holds rows out by their place."""
        return self.name in ORDERED

    @property
    def prediction(self) -> Any:
        info = registry.info(self.name)
        return "frozen" if info.preserves or info.either else "module"

    def empty(self) -> Any:
        if self.module:
            return self.page.init(self.head(), self.task, registry.settings(self.name, {}))
        return self.page.init(self.width(), D)

    def fit(self, *batches: Features, **settings: Any) -> State:
        if self.module:
            rows = Rows(lambda: iter(batches), sum(len(b) for b in batches))
            return registry.fit(self.name, self.head(), self.task, rows, settings)
        stats = self.empty()
        for batch in batches:
            stats = self.page.update(stats, batch)
        return self.finish(stats)

    def finish(self, stats: Any) -> State:
        if self.module:
            done: State = self.page.finish(stats, self.head(), registry.settings(self.name, {}))
            return done
        state: State = self.page.finish(stats, self.head())
        return state

    def spread(self, state: State, rows: Features) -> Spread:
        found: Spread = self.page.spread(state, rows.phi, rows.z)
        return found

    def apply(self, state: State, rows: Features) -> np.ndarray:
        """What the fitted page says of rows: N numbers or more, float64."""
        if not self.module:
            return np.asarray(self.page.score(state, rows.phi, rows.z))[:, None]
        spread = self.spread(state, rows)
        eps = None
        if spread.directions is not None:
            eps = links.normal_draws(len(spread.directions), 0)
        parts = [v for v in (spread.variance, spread.shift, spread.class_variance) if v is not None]
        if spread.decomposes:
            parts.append(links.deviations(spread, eps))
        return np.concatenate([np.reshape(v, (len(rows), -1)) for v in parts], 1)

    def __str__(self) -> str:
        return f"{self.name}-{self.task}"


ORDERED = {"loss", "bayescap", "vbll", "bootstrap", "nptl", "mixup"}
BUILDERS = {
    "vbll",
    "vbll_generative",
    "vbll_t",
    "weights",
    "mc_dropout",
    "mc_batch_norm",
    "abnn",
    "head_dropout",
    "laplace",
    "laplace_diag",
    "laplace_full",
    "icla",
    "student_t",
    "gaussian",
    "loss",
    "bayescap",
    "bayescap_image",
    "bootstrap",
    "nptl",
    "mixup",
    "gen",
    "msp",
    "max_logit",
    "max_logit_pnorm",
    "energy",
    "react",
    "scale",
    "rmds",
    "mahalanobis",
    "knn",
    "flow",
    "expected_loss",
    "gaussian_density",
    "mds",
    "mds_l2",
    "rmds_l2",
    "vim",
    "fdbd",
    "nci",
}
# What each family of modules is registered as, and the tasks that it has to serve. A name may only
# be added.
PROMISED = {
    "laplace": {"classification", "regression"},
    "laplace_diag": {"classification", "regression"},
    "laplace_full": {"classification", "regression"},
    "icla": {"classification", "regression"},
    "vbll": {"classification", "regression"},
    "vbll_generative": {"classification"},
    "vbll_t": {"regression"},
    "student_t": {"regression"},
    "bootstrap": {"classification", "regression"},
    "nptl": {"classification"},
    "mixup": {"classification"},
    "loss": {"classification", "regression"},
    "bayescap": {"regression"},
    "bayescap_image": {"regression"},
    "gaussian": {"classification"},
    "weights": {"classification", "regression"},
    "mc_dropout": {"classification", "regression"},
    "mc_batch_norm": {"classification", "regression"},
    "abnn": {"classification"},
    "head_dropout": {"classification", "regression"},
}
CASES = [
    Case(name, task)
    for name in (*registry.MODULES, *registry.SCORES)
    for task in registry.info(name).tasks
]

__all__ = ["BUILDERS", "CASES", "PROMISED", "Case", "take"]
