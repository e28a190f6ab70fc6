"""A Gaussian generative head beside the frozen one, and what their disagreement says.

Features are taken as Gaussian in each class, with means mu_c, priors pi_c and one covariance S for
all classes, so that the posterior over classes is a softmax of logits that are linear in them,

    g_c = phi'S^-1 mu_c - mu_c'S^-1 mu_c / 2 + log pi_c

(linear discriminant analysis; with a diagonal S naive Bayes). Such a head needs few labels where
a discriminative one needs many (Zheng et al. 2023, arXiv:2302.02334), but in high dimension its
logits are wildly over-confident: it gets a temperature of its own, on rows that are not in its
sums, and so does the frozen head beside it, so that both are as sure as they may be before one
temperature is fitted for the two. The shrinkage of S is chosen on the same rows.

What is served is the mixture of the two heads, the Gaussian one taken the share k of its way from
the frozen one (k is fitted with the temperature). Its total entropy less the mean of theirs, the
field ``epistemic``, is then the Jensen-Shannon divergence between the answers of the two heads: a
disagreement signal.

Everything is a sum over rows but the held-out ones (`posthoc.methods.held`): rows, and the first
rows of a class, may be added at any time. Memory of a fit is D² + C D float64 numbers (diagonal:
2 D + C D) and the held-out rows, whatever the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State, Task
from posthoc.folds import log_loss
from posthoc.links import Spread, SpreadNames
from posthoc.methods import held
from posthoc.methods.held import Held
from posthoc.methods.temperature import fit_temperature

INFO = Info(
    name="gaussian",
    kind="module",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="Gaussian generative head mixed with the frozen one; their disagreement is epistemic",
    paper=Paper(
        "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications",
        2023,
        "https://arxiv.org/abs/2302.02334",
    ),
    preserves=False,
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


class Settings(BaseModel):
    """``covariance`` full or diagonal (naive Bayes); ``shrinkage`` the share of S that is replaced
    by the mean variance times the identity, None: chosen on held-out rows (Friedman 1989,
    "Regularized discriminant analysis")."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    covariance: Literal["full", "diagonal"] = "full"
    shrinkage: float | None = Field(default=None, gt=0, le=1)


SHRINKAGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over rows: ``count`` C rows by class, ``total`` C×D of features, ``second`` D×D of
    phi phi' (diagonal: D of squares), and the rows held out of them. None before any row."""

    covariance: Literal["full", "diagonal"]
    held: Held = Held()
    count: F64 | None = None
    total: F64 | None = None
    second: F64 | None = None


def init(head: LinearHead | None, task: Task, settings: Settings) -> Stats:
    """The empty statistic; it takes its sizes from the first rows, since no head is needed."""
    del head, task
    return Stats(settings.covariance)


def update(stats: Stats, batch: Features) -> Stats:
    """Add the rows of a batch, or hold them out."""
    more, rest = held.hold(stats.held, batch)
    return _add(replace(stats, held=more), rest)


def merge(a: Stats, b: Stats) -> Stats:
    """The statistic of both sets of rows."""
    more, back = held.merge(a.held, b.held)
    if a.count is None or b.count is None:
        return replace(b if a.count is None else a, held=more)
    assert a.total is not None and b.total is not None
    assert a.second is not None and b.second is not None
    whole = Stats(a.covariance, more, a.count + b.count, a.total + b.total, a.second + b.second)
    return whole if back is None else _add(whole, back)


def finish(
    stats: Stats, head: LinearHead | None, settings: Settings, heldout: Features | None = None
) -> State:
    """Both temperatures and the shrinkage from the rows held out, then the head from all rows.

    A class without rows has the mean of all features, and the prior of one row less than a class
    with one. Raises FitError for rows of one class only, for features that are constant within
    every class, and where no row was held out.
    """
    del head, heldout
    if stats.count is None or len(stats.held) == 0:
        raise FitError(
            "gaussian: too few rows that differ to hold out some for its temperature; give more"
        )
    rows = stats.held.rows
    assert rows is not None and rows.phi is not None and rows.y is not None
    y = np.asarray(rows.y, np.int64)
    whole, part = _fit(_add(stats, rows)), _fit(stats)
    tried = SHRINKAGES if settings.shrinkage is None else (settings.shrinkage,)
    found = []
    for shrinkage in tried:
        weight, bias = part.head(shrinkage)
        logits = (rows.phi - part.mean) @ weight + bias
        t = fit_temperature(logits, y)
        found.append((float(log_loss(logits, y, temperature=t).mean()), shrinkage, t))
    nll, shrinkage, own = min(found)
    frozen = fit_temperature(rows.z, y)
    weight, bias = whole.head(shrinkage)
    # In numbers that float32 holds exactly: a graph subtracts what the definition subtracts.
    mean = whole.mean.astype(np.float32).astype(np.float64)
    bias = bias + (mean - whole.mean) @ weight
    scale = frozen / own
    return State(
        {"mean": mean, "weight": scale * weight, "bias": scale * bias},
        {
            "covariance": stats.covariance,
            "shrinkage": shrinkage,
            "temperature": own,
            "frozen_temperature": frozen,
            "held_out_rows": len(y),
            "held_out_nll": nll,
            "held_out_nll_frozen": float(log_loss(rows.z, y, temperature=frozen).mean()),
            "rows": int(whole.count.sum()),
            "classes_without_rows": int((whole.count == 0).sum()),
        },
    )


def spread(state: State, phi: Array, z: Array) -> Spread:
    """Two members for N rows: the frozen head (deviation 0) and the Gaussian one, N×2×C."""
    t = state.tensors
    z = np.asarray(z, np.float64)
    logits = (np.asarray(phi, np.float64) - t["mean"]) @ t["weight"] + t["bias"]
    away = logits - (z - z.mean(1, keepdims=True))
    return Spread(None, draws=np.stack([np.zeros_like(away), away], 1))


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    psi = g.op("Sub", phi, g.const(t["mean"]))
    logits = g.op("Gemm", psi, g.const(t["weight"]), g.const(t["bias"]))
    centred = g.op("Sub", z, g.reduce("ReduceMean", z, 1, keepdims=True))
    away = g.unsqueeze(g.op("Sub", logits, centred), 1)
    return SpreadNames(None, draws=g.op("Mul", away, g.const([[[0.0], [1.0]]])))


@dataclass(frozen=True, slots=True)
class _Gaussians:
    """``mean`` D of all features, ``away`` C×D of the class means from it (0 for a class without
    rows) and ``values`` D of S, both in ``basis`` D×D (None: the features themselves)."""

    count: F64
    mean: F64
    away: F64
    values: F64
    basis: F64 | None

    def head(self, shrinkage: float) -> tuple[F64, F64]:
        """(weight D×C, bias C) on features less their mean, centred over classes."""
        values = (1 - shrinkage) * self.values + shrinkage * self.values.mean()
        solved = self.away / values
        weight = (solved if self.basis is None else solved @ self.basis.T).T
        prior = np.log((self.count + 1) / (self.count.sum() + len(self.count)))
        bias = prior - 0.5 * (solved * self.away).sum(1)
        return weight - weight.mean(1, keepdims=True), bias - bias.mean()


def _fit(stats: Stats) -> _Gaussians:
    count, total, second = stats.count, stats.total, stats.second
    assert count is not None and total is not None and second is not None
    seen, n = count > 0, count.sum()
    if seen.sum() < 2:
        raise FitError(f"gaussian needs rows of two classes or more, and has {int(seen.sum())}")
    mean = total.sum(0) / n
    away = np.where(seen[:, None], total / np.maximum(count, 1)[:, None] - mean, 0.0)
    weighted = away * count[:, None]
    if stats.covariance == "diagonal":
        values = second - n * mean**2 - (weighted * away).sum(0)
        basis = None
    else:
        values, basis = np.linalg.eigh(second - n * np.outer(mean, mean) - weighted.T @ away)
        away = away @ basis
    # The squares of features far from 0 cancel: what is left of a constant one is rounding.
    if values.max() <= len(mean) * np.finfo(np.float64).eps * np.abs(second).max():
        raise FitError("gaussian: the features are constant within every class")
    return _Gaussians(count, mean, away, np.maximum(values, 0.0) / n, basis)


def _add(stats: Stats, rows: Features) -> Stats:
    """Add rows to the sums."""
    phi, y, classes = np.asarray(rows.phi), np.asarray(rows.y, np.int64), rows.z.shape[1]
    count, total, second = stats.count, stats.total, stats.second
    if count is None or total is None or second is None:
        d = phi.shape[1]
        count, total = np.zeros(classes), np.zeros((classes, d))
        second = np.zeros(d) if stats.covariance == "diagonal" else np.zeros((d, d))
    order = np.argsort(y, kind="stable")
    named, starts = np.unique(y[order], return_index=True)
    total = total.copy()
    if len(named):
        total[named] += np.add.reduceat(phi[order], starts)
    count = count + np.bincount(y, minlength=classes)
    squares = (phi**2).sum(0) if stats.covariance == "diagonal" else phi.T @ phi
    return replace(stats, count=count, total=total, second=second + squares)
