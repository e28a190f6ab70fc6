"""Every candidate on re-splits of cached rows, ranked; the recommended one on locked rows.

A part of the items is locked away first. The rest is split again and again by hash; every candidate
is fitted and measured on each split, every score beside strange rows. What is recommended is fitted
on the rest once more and measured on the locked rows, which had no part in the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration.comparison import pool
from calibration.comparison.advice import advise
from calibration.comparison.candidates import ALONE, applicable, scalings
from calibration.comparison.final import finals
from calibration.comparison.leaderboard import standings
from calibration.comparison.measure import LOSSES, Measured, measure
from calibration.comparison.records import Comparison, ScoreStanding
from calibration.comparison.scores import Told, ranked, tell
from calibration.fit_options import FitOptions, Scale, check_options, score_names
from calibration.head import Head
from calibration.material import DEFAULT_SPLIT, Material, Progress
from calibration.ood_choice import candidates
from calibration.proxies import ABOUT, HELD_OUT
from calibration.strange import SHIFTED, Strange
from posthoc import registry
from posthoc.contract import I64, Features, FitError
from posthoc.data import split_roles

SPLITS = 5
LOCKED = 0.2  # of the items
_SALT = 10_007  # of the lock: no seed of a split


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is compared, and how; None: everything that fits.

    ``by`` is the loss that ranks (nll, or brier; a regression: nll or crps), ``prediction`` module
    of the options lets a module be recommended that changes the model's answer. ``ood_data`` are
    strange rows by name, ``labelled`` further labelled sets, on which every candidate is measured
    and none is ranked; ``corrupt`` asks for corrupted copies of the user's rows beside them, all
    kinds or those named. ``workers`` is the number of processes.
    """

    methods: tuple[str, ...] | None = None
    scalings: tuple[str, ...] | None = None
    scores: tuple[str, ...] | None = None
    by: str = "nll"
    splits: int = SPLITS
    locked: float = LOCKED
    labelled: Mapping[str, str | Path] = dataclasses.field(default_factory=dict)
    ood_data: Mapping[str, str | Path] = dataclasses.field(default_factory=dict)
    corrupt: bool | tuple[str, ...] = False
    workers: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A comparison, and each candidate's head of the first split."""

    comparison: Comparison
    heads: dict[str, Head]


def contest(
    material: Material,
    options: FitOptions,
    asked: Asked,
    methods: list[str],
    strange: list[Strange],
    kept: Mapping[str, Features],
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
    progress: Progress | None = None,
) -> Found:
    """The comparison of cached rows alone. ``kept`` are strange rows for the recommended score."""
    report = progress or (lambda what, done, total: None)
    rest, locked = lock(material, asked.locked)
    grouped = material.mapping.split_by is not None or material.frozen.dense is not None
    keys = material.cache.split_keys if grouped else None
    families = scalings(
        options.task,
        int(len(rest.usable) * fractions["calibration"]),
        max(2, rest.cache.z.shape[1]),  # one output of a classifier is two classes
        asked.scalings,
    )
    tasks = [
        (method, families, seed, options, fractions)
        for method in _slow_first(methods)
        for seed in _seeds(asked, options)
    ]
    labelled = [s for s in strange if s.rows.y is not None]
    apart = [s for s in strange if s.kind != SHIFTED]
    measured: list[Measured] = []
    heads: dict[str, Head] = {}
    for runs in pool.each(
        _measure,
        (rest, labelled),
        tasks,
        workers=asked.workers,
        done=lambda done, total: report("fits", done, total),
    ):
        heads |= {m.candidate.name: m.head for m in runs if m.head is not None}
        measured += [dataclasses.replace(m, head=None) for m in runs]
    table = standings(measured, asked.by, keys, seed=options.seed)
    scores = _scores(rest, options, asked, apart, fractions, report)
    advice = advise(table, scores, options.task, asked.by, relabels=options.prediction == "module")
    shown = {s.name for s in table if s.rank == 1} | {advice.name}
    order = [c for c in dict.fromkeys(m.candidate for m in measured) if c.name in shown]
    final = finals(
        rest,
        locked,
        order,
        options,
        by=asked.by,
        score=advice.score,
        fractions=fractions,
        outside=kept,
        beside=strange,
        keys=None if keys is None else keys[locked],
        done=lambda done, total: report("final", done, total),
    )
    about = {s.name: s.about for s in strange}
    if any(HELD_OUT in s.auroc for s in scores):
        about[HELD_OUT] = ABOUT
    return Found(
        Comparison(
            task=options.task,
            by=asked.by,
            splits=asked.splits,
            rows=len(rest.usable),
            locked=len(locked),
            model_rows=0,
            standings=table,
            scores=scores,
            proxies=about,
            final=final,
            recommendation=advice,
        ),
        heads,
    )


def lock(material: Material, share: float) -> tuple[Material, I64]:
    """(the material without the locked items, the places of their rows in the cache)."""
    keys = material.cache.split_keys[material.usable]
    role = split_roles(keys, {"rest": 1 - share, "locked": share}, _SALT)
    rest = dataclasses.replace(material, usable=material.usable[role == 0])
    locked = np.asarray(material.usable[role == 1], np.int64)
    if len(locked) == 0 or len(rest.usable) == 0:
        raise FitError(f"{len(keys)} rows are too few to lock a share {share:g} of them away")
    return rest, locked


def check(asked: Asked, options: FitOptions) -> None:
    """What can be refused before the model is opened."""
    check_options(options.model_copy(update={"method": "none", "prediction": "frozen"}))
    for score in asked.scores or ():
        for name in score_names(score):
            if registry.info(name).kind != "score":
                raise FitError(f"{name} is a module and no score; name it with --methods")
    if asked.by not in LOSSES[options.task]:
        known = " or ".join(LOSSES[options.task])
        raise FitError(f"--by {asked.by} does not rank a {options.task}; take {known}")
    if asked.splits < 2:
        raise FitError("--splits counts re-splits, whose spread is shown: two at least")
    if not 0 < asked.locked < 1:
        raise FitError(f"--locked is a share of the items between 0 and 1, not {asked.locked}")


def methods_of(
    material: Material, options: FitOptions, asked: Asked
) -> tuple[list[str], dict[str, str]]:
    """(methods to compare, none first; why other modules are not)."""
    fitting, left = applicable(material, options.task)
    if asked.methods is None:
        return fitting, left
    for name in asked.methods:
        if name not in fitting:
            why = left.get(name) or f"is not a module for {options.task}"
            raise FitError(f"{name} cannot be compared here: it {why}")
    return [ALONE, *(m for m in asked.methods if m != ALONE)], {}


def _slow_first(methods: list[str]) -> list[str]:
    """Iterative fits before sums: the longest piece of work must not come last."""
    slow = {m for m in methods if m != ALONE and hasattr(registry.page(m), "fit")}
    return [*(m for m in methods if m in slow), *(m for m in methods if m not in slow)]


def _seeds(asked: Asked, options: FitOptions) -> range:
    return range(options.seed, options.seed + asked.splits)


def _measure(
    shared: tuple[Material, list[Strange]],
    method: str,
    families: list[Scale],
    seed: int,
    options: FitOptions,
    fractions: Mapping[str, float],
) -> list[Measured]:
    material, labelled = shared
    return measure(
        material,
        method,
        families,
        seed,
        options,
        labelled=labelled,
        fractions=fractions,
        keep_head=seed == options.seed,
    )


def _tell(
    shared: tuple[Material, list[Strange]],
    scores: list[str],
    seed: int,
    options: FitOptions,
    fractions: Mapping[str, float],
) -> Told:
    material, strange = shared
    return tell(material, scores, seed, options.task, strange, fractions)


def _scores(
    rest: Material,
    options: FitOptions,
    asked: Asked,
    strange: list[Strange],
    fractions: Mapping[str, float],
    report: Progress,
) -> tuple[ScoreStanding, ...]:
    """The ranking of scores; empty where nothing strange is known and no class can be held out."""
    wanted = asked.scores or candidates(options.task, rest.frozen.phi is not None, rest.linear)
    if asked.scores == () or not (strange or options.task == "classification"):
        return ()
    tasks = [
        (some, seed, options, fractions)
        for some in _apart(wanted)
        for seed in _seeds(asked, options)
    ]
    told = pool.each(
        _tell,
        (rest, strange),
        tasks,
        workers=asked.workers,
        done=lambda done, total: report("scores", done, total),
    )
    return ranked(told, {s.name: s.kind for s in strange})


def _apart(scores: Sequence[str]) -> list[list[str]]:
    """Scores that may be fitted in different processes: mixtures share their members' fits, and so
    stay together with these; the others by themselves."""
    mixed = {name for s in scores if "+" in s for name in score_names(s)}
    together = [s for s in scores if "+" in s or s in mixed]
    alone = [[s] for s in scores if s not in together]
    return [together, *alone] if together else alone
