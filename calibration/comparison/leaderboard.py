"""Re-splits → a ranking: means with their spread, and what is not surely worse than the best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calibration.comparison.candidates import BASELINE, Candidate
from calibration.comparison.measure import Measured
from calibration.comparison.records import Spread, Standing
from calibration.evaluation.records import Figure
from calibration.metrics.bootstrap import Estimate, paired_difference
from calibration.metrics.comparison import against_best
from posthoc.contract import F64, Array, FitError

SURE = 0.05  # a difference to the best with a smaller p-value is one


def standings(
    measured: Iterable[Measured],
    by: str,
    keys: Array | None = None,
    *,
    seed: int = 0,
) -> tuple[Standing, ...]:
    """Every candidate, the one with the least mean loss ``by`` first.

    A row's loss is its mean over the splits that tested it, and all candidates are held against
    each other on the same rows; ``keys`` (by place in the cache) are those of rows that come in
    groups. A candidate that failed on a split is last and has no rank. The spread of a choice among
    splits is not in these intervals: they say how far the rows would have to change.
    """
    runs: dict[Candidate, list[Measured]] = defaultdict(list)
    for m in measured:
        runs[m.candidate].append(m)
    for found in runs.values():
        found.sort(key=lambda m: m.seed)
    whole = {c: r for c, r in runs.items() if all(m.error is None for m in r)}
    if BASELINE not in whole:
        errors = {m.error for m in runs.get(BASELINE, ()) if m.error}
        raise FitError(f"the baseline cannot be fitted: {'; '.join(sorted(errors)) or 'no split'}")
    losses, rows = _per_row(whole, by)
    groups = None if keys is None else keys[rows]
    compared = against_best({c.name: v for c, v in losses.items()}, groups=groups, seed=seed)
    base = losses[BASELINE]
    order = sorted(whole, key=lambda c: float(losses[c].mean()))
    table = []
    for rank, candidate in enumerate(order, 1):
        best = compared[candidate.name]
        to_base = None
        if candidate != BASELINE:
            to_base = _figure(paired_difference(losses[candidate], base, groups=groups, seed=seed))
        table.append(
            Standing(
                rank=rank,
                **_who(candidate),
                figures=spreads([m.figures for m in whole[candidate]]),
                others=_others(whole[candidate]),
                to_best=_figure(best.difference),
                to_baseline=to_base,
                p_value=best.p_value,
                tied=best.p_value >= SURE,
                fit_seconds=float(np.mean([m.seconds for m in whole[candidate]])),
            )
        )
    for candidate in sorted(set(runs) - set(whole), key=lambda c: c.name):
        good = [m for m in runs[candidate] if m.error is None]
        table.append(
            Standing(
                rank=None,
                **_who(candidate),
                figures=spreads([m.figures for m in good]),
                errors=tuple(sorted({m.error for m in runs[candidate] if m.error is not None})),
            )
        )
    return tuple(table)


def _who(c: Candidate) -> dict[str, Any]:
    return {"name": c.name, "method": c.method, "scaling": c.scaling, "keeps": c.keeps}


def _others(runs: Sequence[Measured]) -> dict[str, dict[str, Spread]]:
    names = dict.fromkeys(name for m in runs for name in m.others)
    return {n: spreads([m.others[n] for m in runs if n in m.others]) for n in names}


def spreads(figures: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean and standard deviation of each figure over splits."""
    found = {}
    for key in figures[0] if figures else ():
        values = np.asarray([f[key] for f in figures if key in f])
        sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        found[key] = Spread(mean=float(values.mean()), sd=sd)
    return found


def _per_row(
    whole: Mapping[Candidate, Sequence[Measured]], by: str
) -> tuple[dict[Candidate, F64], Array]:
    """(mean loss of each row that was tested, by candidate; the rows' places in the cache)."""
    tested = [m.rows for m in whole[BASELINE] if m.rows is not None]
    rows, at = np.unique(np.concatenate(tested), return_inverse=True)
    count = np.bincount(at, minlength=len(rows))
    found = {}
    for candidate, runs in whole.items():
        if by not in runs[0].losses:
            raise FitError(f"no loss is called {by!r}; there are {', '.join(runs[0].losses)}")
        every = np.concatenate([m.losses[by] for m in runs])
        found[candidate] = np.asarray(np.bincount(at, every, len(rows)) / count)
    return found, rows


def _figure(estimate: Estimate) -> Figure:
    return Figure(value=estimate.value, low=estimate.low, high=estimate.high)
