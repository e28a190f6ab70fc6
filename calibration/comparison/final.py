"""The recommended candidate on the locked rows, which had no part in its choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from calibration.comparison.candidates import BASELINE, Candidate, options_of
from calibration.comparison.measure import figures_of
from calibration.comparison.records import Final
from calibration.evaluation.records import Figure
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import Fitted, run_head
from calibration.material import Material, parts_of, split
from calibration.metrics.bootstrap import Estimate, mean_estimates, paired_difference
from calibration.metrics.ranking import auroc_estimate
from calibration.strange import Strange
from posthoc.contract import F64, I64, Array, Features


def finals(
    rest: Material,
    locked: I64,
    candidates: Sequence[Candidate],
    options: FitOptions,
    *,
    by: str,
    score: str | None,
    fractions: Mapping[str, float],
    outside: Mapping[str, Features],
    beside: Sequence[Strange],
    keys: Array | None,
    done: Callable[[int, int], None],
) -> tuple[Final, ...]:
    """Each candidate on the locked rows, the baseline first. ``outside`` are strange rows that
    chose nothing, ``beside`` further sets: of these corrupted copies of locked rows, and labelled
    rows, are measured too. ``done`` is told how many of how many are done.

    They are fitted on the ``rest`` once more, split by the seed of ``options``. Intervals are of
    rows, or of the groups ``keys`` (N locked rows) that they come in.
    """
    parts, _ = parts_of(rest, split(rest, options.seed, fractions))
    test = rest.features(locked)
    copies = {s.name: s.beside(locked) for s in beside if s.source is not None}
    strange = {**outside, **{k: r for k, r in copies.items() if len(r)}}
    labelled = {s.name: s.beside(locked) for s in beside if s.rows.y is not None}
    found: list[Final] = []
    base: dict[str, F64] | None = None
    order = list(dict.fromkeys([BASELINE, *candidates]))
    for i, candidate in enumerate(order):
        done(i, len(order))
        asked = options_of(candidate, options, options.seed)
        served = asked.model_copy(update={"ood": score or "none", "max_error": options.max_error})
        fitted = fit_head(rest.linear, parts, served, None, rest.train)
        figures, losses = figures_of(fitted, test, {})
        metrics = {k: Figure(value=v) for k, v in figures.items()}
        metrics |= {
            k: _figure(e) for k, e in mean_estimates(losses, groups=keys, seed=options.seed).items()
        }
        to_base = None
        if base is not None:
            to_base = _figure(paired_difference(losses[by], base[by], groups=keys))
        base = base or losses
        found.append(
            Final(
                name=candidate.name,
                metrics=metrics,
                to_baseline=to_base,
                others={k: figures_of(fitted, r, {})[0] for k, r in labelled.items() if len(r)},
                ood=_told(fitted, test, strange, keys),
            )
        )
    done(len(order), len(order))
    return tuple(found)


def _told(
    fitted: Fitted, test: Features, outside: Mapping[str, Features], keys: Array | None
) -> dict[str, Figure]:
    """AUROC of the served score on strange rows that no choice saw, by the name of their set."""
    if fitted.head.ood is None:
        return {}
    inside = run_head(fitted.head, test)["ood_score"]
    return {
        name: _figure(
            auroc_estimate(inside, run_head(fitted.head, rows)["ood_score"], negative_groups=keys)
        )
        for name, rows in outside.items()
    }


def _figure(estimate: Estimate) -> Figure:
    value, low, high = (float(v) for v in (estimate.value, estimate.low, estimate.high))
    return Figure(value=value, low=low if np.isfinite(low) else None, high=high)
