"""Several labelled sets beside each other: of each row what a mean needs, and the means with their
intervals.

Rows are folded into a few numbers each, batch by batch, so that little memory holds a set
of any width. The promise of coverage is for rows like those of the fit; of others it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from calibration.evaluation.parts import Resampling, against, figures, independent, level
from calibration.evaluation.records import Figure, Level, SetSummary
from calibration.metrics.binomial import share_interval
from calibration.metrics.bootstrap import N_BOOT, row_weights
from calibration.metrics.calibration_error import debiased_ece, perfect_band
from calibration.metrics.proper import brier_score, gaussian_crps, gaussian_log_loss
from calibration.metrics.regression import gaussian_pit, perfect_pce, pit_totals
from calibration.metrics.totals import ClassificationTotals, update_classification
from posthoc.contract import F64, Array, DataError, Task
from posthoc.folds import log_loss_of_probs, run

_FEW = 10  # rows, fewer than which a bootstrap says too little
_HELD = 2_000_000  # counts held at a time
_MEANS = {"classification": ("accuracy", "nll", "brier"), "regression": ("rmse", "nll", "crps")}
_FINITE = ("probs", "mean", "std")
HELD = {"flagged": "ood", "abstained": "abstain"}  # what it is called here, and its field


class SetRows:
    """What single rows of one set were worth: columns by name, N each (``pit`` N×K)."""

    def __init__(self, task: Task, alphas: Sequence[float]):
        self.task, self.alphas = task, tuple(alphas)
        self.parts: dict[str, list[Array]] = {}
        self.refused = 0

    def add(self, made: Mapping[str, Array], y: Array, keys: Array) -> None:
        """N rows of the graph with their labels and the keys that tell independent rows apart. One
        without a finite answer is counted as refused, as a server would refuse it."""
        finite = np.ones(len(keys), bool)
        for name in _FINITE:
            if name in made:
                finite &= np.isfinite(made[name].reshape(len(keys), -1)).all(1)
        self.refused += int((~finite).sum())
        if not finite.any():
            return
        made, y = {k: v[finite] for k, v in made.items()}, y[finite]
        columns = _classes(made, y) if self.task == "classification" else _values(made, y)
        for alpha in self.alphas:
            columns |= _covered(made, y, alpha)
        for name, field in HELD.items():
            if field in made:
                columns[name] = np.asarray(made[field], bool)
        columns["key"] = keys[finite]
        for name, value in columns.items():
            self.parts.setdefault(name, []).append(value)

    def columns(self) -> dict[str, Array]:
        """Every column; empty for no rows."""
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}


def _classes(made: Mapping[str, Array], y: Array) -> dict[str, Array]:
    return {
        "accuracy": (made["label"] == y).astype(np.float64),
        "nll": log_loss_of_probs(made["probs"], y),
        "brier": brier_score(made["probs"], y),
        "confidence": made["confidence"],
    }


def _values(made: Mapping[str, Array], y: Array) -> dict[str, Array]:
    mean, std = _two(made["mean"]), _two(made["std"])
    error = _two(y) - mean
    return {
        "squared_error": (error**2).mean(axis=1),
        "nll": gaussian_log_loss(error, std).mean(axis=1),
        "crps": gaussian_crps(error, std).mean(axis=1),
        "pit": gaussian_pit(np.zeros_like(error), std, error),
    }


def _covered(made: Mapping[str, Array], y: Array, alpha: float) -> dict[str, Array]:
    if f"set@{alpha}" in made:
        mask = made[f"set@{alpha}"]
        return {
            f"covered@{alpha}": np.asarray(mask[np.arange(len(y)), y], bool),
            f"size@{alpha}": mask.sum(axis=1, dtype=np.float64),
        }
    low, high, truth = _two(made[f"lower@{alpha}"]), _two(made[f"upper@{alpha}"]), _two(y)
    return {
        f"covered@{alpha}": ((low <= truth) & (truth <= high)).all(axis=1),
        f"size@{alpha}": (high - low).mean(axis=1),
    }


class Described(NamedTuple):
    """What a set is: its name, rows dropped, and the corruption that made it, if one did."""

    name: str
    dropped: int
    corruption: str | None = None
    severity: int | None = None


def summarise(
    rows: SetRows,
    what: Described,
    *,
    n_conformal: int,
    grouped: bool,
    banded: bool,
    first: Mapping[str, Array] | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> SetSummary:
    """The figures of one set, and their change from the columns of the ``first``.

    ``grouped``: keys are ids of items, whose rows are no independent evidence. ``banded`` says
    whether one band of luck holds for all rows. Raises DataError where no row is left.
    """
    columns = rows.columns()
    if not columns:
        raise DataError(
            f"set {what.name!r}: no row is left ({what.dropped} were used by the fit or are "
            f"faulty, {rows.refused} have no finite answer)"
        )
    how = Resampling(columns["key"] if grouped else None, n_boot, seed)
    n = len(columns["key"])
    change = {}
    if first is not None:
        change = changes(columns, first, _MEANS[rows.task], n_boot, seed)
    held = [columns[k] for k in HELD if k in columns]
    shares: dict[str, Array] = {k: columns[k].astype(np.float64) for k in HELD if k in columns}
    if held:
        shares["answered"] = (~np.logical_or.reduce(held)).astype(np.float64)
    found = {name: _share(column, how) for name, column in shares.items()}
    return SetSummary(
        name=what.name,
        n=n,
        dropped=what.dropped,
        refused=rows.refused,
        corruption=what.corruption,
        severity=what.severity,
        metrics=_metrics(rows.task, columns, how),
        change=change,
        levels=tuple(_level(columns, a, n_conformal, how, banded) for a in rows.alphas),
        flagged=found.get("flagged"),
        abstained=found.get("abstained"),
        answered=found.get("answered"),
        answered_error=_answered(rows.task, columns, shares.get("answered"), how),
    )


def _metrics(task: Task, columns: Mapping[str, Array], how: Resampling) -> dict[str, Figure]:
    if task == "classification":
        right = columns["accuracy"]
        totals = update_classification(
            ClassificationTotals(),
            confidence=columns["confidence"],
            label=np.zeros(len(right), np.int64),
            y=(right == 0).astype(np.int64),
        )
        band = perfect_band(columns["confidence"], seed=how.seed)
        found = figures({m: columns[m] for m in ("accuracy", "nll", "brier")}, how)
        return found | {"debiased_ece": against(debiased_ece(totals), band.debiased_ece)}
    found = figures({m: columns[m] for m in ("squared_error", "nll", "crps")}, how)
    pit = run(pit_totals, [columns["pit"]])
    return {
        "rmse": _root(found["squared_error"]),
        "nll": found["nll"],
        "crps": found["crps"],
        "pce": against(pit.pce, perfect_pce(pit.n, seed=how.seed)),
    }


def _level(
    columns: Mapping[str, Array], alpha: float, n_conformal: int, how: Resampling, banded: bool
) -> Level:
    covered, size = columns[f"covered@{alpha}"], columns[f"size@{alpha}"]
    n = independent(len(covered), how.groups)
    empty = float((size == 0).mean()) if "accuracy" in columns else None
    found = level(alpha, float(covered.mean()), float(size.mean()), n, n_conformal, empty)
    return found if banded else found.model_copy(update={"banded": False})


def _answered(
    task: Task, columns: Mapping[str, Array], answered: Array | None, how: Resampling
) -> Figure | None:
    if answered is None or not answered.any():
        return None
    kept = answered == 1
    groups = None if how.groups is None else how.groups[kept]
    own = how._replace(groups=groups)
    if task == "classification":
        return _share(1 - columns["accuracy"][kept], own)
    found = _root(figures({"error": columns["squared_error"][kept]}, own)["error"])
    few = independent(int(kept.sum()), groups) < _FEW
    return Figure(value=found.value) if few else found


def _share(column: Array, how: Resampling) -> Figure:
    """The share of ones with its 95 % interval: of independent rows the exact one (Clopper &
    Pearson 1934), since a bootstrap of none, or of all, says that nothing else is possible."""
    if how.groups is not None:
        return figures({"share": column}, how)["share"]
    n, k = len(column), int(column.sum())
    low, high = share_interval(k, n)
    return Figure(value=k / n, low=low, high=high)


def _root(f: Figure) -> Figure:
    return Figure(
        value=math.sqrt(f.value),
        low=math.sqrt(max(f.low or 0.0, 0.0)),
        high=math.sqrt(max(f.high or 0.0, 0.0)),
    )


def changes(
    mine: Mapping[str, Array],
    first: Mapping[str, Array],
    metrics: Sequence[str],
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> dict[str, Figure]:
    """Each metric of these rows less that of the first set's, with its 95 % percentile interval
    over resampled keys.

    A key that both sets have, the same row spoilt or another row of one item, is drawn for both at
    once: the difference is paired as far as the sets are. A resample without a row of either is
    left out.
    """
    keys, codes = np.unique(np.concatenate([mine["key"], first["key"]]), return_inverse=True)
    at = np.split(codes, [len(mine["key"])])
    sums = np.stack(
        [
            np.bincount(where, weight, len(keys))
            for where, set_ in zip(at, (mine, first), strict=True)
            for weight in (*(set_[_column(m)] for m in metrics), None)
        ],
        axis=1,
    )
    draws = row_weights(len(keys), groups=None, n_boot=n_boot, seed=seed)
    total = np.concatenate([block @ sums for block in _blocks(draws, len(keys))])
    half = len(metrics) + 1
    total = total[(total[:, half - 1] > 0) & (total[:, -1] > 0)]
    found = {}
    for i, metric in enumerate(metrics):
        root = np.sqrt if metric == "rmse" else np.asarray
        drawn = root(total[:, i] / total[:, half - 1])
        drawn = drawn - root(total[:, half + i] / total[:, -1])
        low, high = np.quantile(drawn, [0.025, 0.975])
        value = root(mine[_column(metric)].mean()) - root(first[_column(metric)].mean())
        found[metric] = Figure(value=float(value), low=float(low), high=float(high))
    return found


def _column(metric: str) -> str:
    return "squared_error" if metric == "rmse" else metric


def _blocks(draws: Iterator[F64], width: int) -> Iterator[F64]:
    while block := list(islice(draws, max(1, _HELD // width))):
        yield np.array(block)


def _two(x: Array) -> F64:
    a = np.asarray(x, np.float64)
    return a[:, None] if a.ndim == 1 else a
