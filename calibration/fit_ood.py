"""Scores that tell strange rows: fitted on module rows, standardised on calibration rows, and the
flag's threshold from conformal rows."""

from __future__ import annotations

import math

import numpy as np

from calibration.bundle import FittedRecord, OodRecord
from calibration.fit_options import RANK, score_names
from calibration.head import Member, Ood
from calibration.ranks import fit_ranks
from calibration.threshold import neyman_pearson_rank, neyman_pearson_rows, pvalue_table
from posthoc import registry
from posthoc import rows as blocks_of
from posthoc.contract import Array, Features, FitError, LinearHead, State, Task
from posthoc.folds import Mapper

FINEST = 0.03  # of a score, what counts as one: a standard deviation, or a rank


def fit_ood(
    linear: LinearHead | None,
    module: Features,
    calibration: Features,
    *,
    task: Task,
    ood: str,
    own: blocks_of.Rows | None = None,
    mapper: Mapper | None = None,
) -> Ood:
    """The scores that ``ood`` names (a+b: their mean; rank:a+b: that of their ranks), fitted on
    module rows and standardised, or ranked, on calibration rows; thresholds follow later. ``own``
    are the module rows once more, in shares for the workers of ``mapper``.

    Raises FitError for a score that does not fit the model, naming those that do.
    """
    have = {"labels"} | ({"features"} if module.phi is not None else set())
    have |= {"linear_head"} if linear is not None else set()
    fitting = registry.applicable(registry.SCORES, task, have)
    wanted = score_names(ood)
    for name in wanted:
        if name not in fitting:
            raise FitError(
                f"the OOD score {name!r} does not fit this model; these do: "
                f"{', '.join(fitting) or 'none'}"
            )
    ranked = ood.startswith(RANK)
    rows = blocks_of.of(module) if own is None else own
    states = {name: registry.fit_score(name, linear, rows, mapper) for name in wanted}
    members = tuple(_member(name, state, calibration, ranked) for name, state in states.items())
    return Ood(members, np.zeros(0), np.ones(1))


def _member(name: str, state: State, calibration: Features, ranked: bool) -> Member:
    clean = registry.page(name).score(state, calibration.phi, calibration.z)
    mean, scale = float(clean.mean()), float(clean.std())
    # A score that hardly varies, such as GEN of an untrained network, would be blown up until the
    # graph's float32 shows.
    scale = max(scale, FINEST * abs(mean)) or 1.0
    steepest = 1 / (FINEST * max(scale, abs(mean)))
    return Member(name, state, mean, scale, fit_ranks(clean, scale, steepest) if ranked else None)


def flag(ood: Ood, scores: Array, alpha: float, delta: float) -> tuple[Ood, OodRecord]:
    """The p-value table and the flag's threshold from sorted ``scores`` of conformal rows: with
    confidence 1 - delta at most the share alpha of clean rows is flagged (Neyman–Pearson)."""
    table, p = pvalue_table(scores)
    rank = neyman_pearson_rank(len(scores), alpha, delta)
    threshold = math.inf if rank is None else float(scores[rank - 1])
    members = ood.members
    settings = {m.name: {**m.state.settings, "mean": m.mean, "scale": m.scale} for m in members}
    ranked = RANK if any(m.ranks is not None for m in members) else ""
    record = OodRecord(
        score=FittedRecord(name=ranked + "+".join(m.name for m in members), settings=settings),
        alpha=alpha,
        delta=delta,
        n=len(scores),
        n_needed=neyman_pearson_rows(alpha, delta),
        threshold=None if rank is None else threshold,
    )
    return Ood(members, table, p, threshold), record
