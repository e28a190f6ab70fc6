"""``python -m bench shift_kinds``: which kind of shift is told of which, on the developer suite.

Each classifier of the suite is fitted by temperature alone on a quarter of its rows, with the OOD
score that `hedged fit` chooses. Of the test rows up to 2,000 are the reference and 1,000 others (or
as many as there are) the window, which is left as it is or shifted:

- ``class mix``: thinned by true class, a row staying in proportion to exp(s·normal) of its class;
- ``new classes``: a share of rows comes from the set's strange rows;
- ``corrupted``: each corruption, of all rows of the window, at severities 1 to 5;
- ``a fifth corrupted``: the same, of a fifth of them.

``table`` counts what was told, by shift and intensity and in all; each share has its 95 % interval
(Clopper-Pearson), as if windows of one split, which share rows, were independent.
``false_kind`` is the share of unshifted windows, ``false_by_set`` of the worst set, of which
anything but ``none`` was told. ``all_rows_excludes`` counts how often ``all_rows`` was told of new
classes of at most two fifths of the rows, which the kind excludes. ``crowding`` is the AUROC of the
crowding of ``some_rows`` told of new classes against corrupted rows.

The constants of the page were chosen on five sets (``chosen_on``) and seeds 0 to 3; ``fresh`` are
the same figures of the other sets alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.material import Known
from bench.processes import each
from bench.suite import find, load, suite
from calibration.corruption import CORRUPTIONS, kind_of
from calibration.drift import shift_kind
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.head import Head
from calibration.material import ROLES, parts_of, split
from calibration.metrics.binomial import share_interval
from calibration.metrics.ranking import auroc
from calibration.strange import corrupted_sets
from posthoc.contract import I64, Array, Features

CHOSEN_ON = ("letter", "satimage", "wa_churn", "magic", "mnistnet")
SEEDS, QUICK_SEEDS = 5, 1
FRACTIONS = dict(zip(ROLES, (0.25, 0.15, 0.15, 0.45), strict=True))
REFERENCE, WINDOW, FEWEST = 2000, 1000, 200
NULLS = 20  # windows of a split that nothing was done to
DRAWS = 5  # windows of a split of each class mix and share of new classes
TILTS = (0.5, 1.0, 2.0)
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
MOST = 0.4  # of the rows, of new classes that `all_rows` excludes
SEVERITIES, QUICK_SEVERITIES = (1, 2, 3, 4, 5), (3,)
PART = 0.2

Told = dict[str, Any]


def run(quick: bool) -> dict[str, Any]:
    """What was told of what."""
    names = [s.name for s in suite() if s.task == "classification"]
    for name in names:
        load(name, grouped=False)  # made on first use, which two processes need not do at once
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    found = [
        r for rows in each(measure, [(n, s, quick) for n in names for s in seeds]) for r in rows
    ]
    fresh = [r for r in found if r["set"] not in CHOSEN_ON]
    return {
        "reference": REFERENCE,
        "window": WINDOW,
        "seeds": len(seeds),
        "sets": names,
        "chosen_on": CHOSEN_ON,
        **figures(found),
        "fresh": figures(fresh),
    }


def figures(found: list[Told]) -> dict[str, Any]:
    """The figures of the docstring."""
    healthy = [r for r in found if r["shift"] == "none"]
    by_set = [[r for r in healthy if r["set"] == n] for n in {r["set"] for r in healthy}]
    few = [r for r in found if r["shift"] == "new classes" and r["intensity"] <= MOST]
    crowded = [
        np.array([r["crowding"] for r in found if r["kind"] == "some_rows" and r["shift"] in of])
        for of in (("corrupted", "a fifth corrupted"), ("new classes",))
    ]
    known, new = (c[np.isfinite(c)] for c in crowded)
    cells = sorted({(r["shift"], r["intensity"]) for r in found})
    table = [_cell(found, shift, at) for shift, at in cells]
    table += [_cell(found, shift, None) for shift in dict.fromkeys(s for s, _ in cells)]
    return {
        "false_kind": _share([r["kind"] != "none" for r in healthy]),
        "false_by_set": max(float(np.mean([r["kind"] != "none" for r in of])) for of in by_set),
        "all_rows_excludes": _share([r["kind"] == "all_rows" for r in few]),
        "crowding": {
            "auroc": auroc(known, new) if len(known) and len(new) else None,
            "new_classes": _quartiles(new),
            "corrupted": _quartiles(known),
        },
        "table": table,
    }


def measure(name: str, seed: int, quick: bool) -> list[Told]:
    """Every window of one split of one set."""
    known, rng = load(name, grouped=False), np.random.default_rng(seed)
    material = known.material
    roles = split(material, seed, FRACTIONS)
    parts, _ = parts_of(material, roles)
    options = FitOptions(
        task=find(name).task, method="none", max_error=None, alphas=(0.3,), seed=seed
    )
    head = fit_head(material.linear, parts, options).head
    every = material.usable[roles == ROLES.index("test")]
    out = run_head(head, material.features(every))
    found = []
    for _ in range(NULLS):
        reference, rest = _parted(len(every), rng)
        found.append(_told(_reference(out, reference), _cells(out, rest[:WINDOW])))
    found = [f | {"shift": "none", "intensity": 0} for f in found]
    reference, rest = _parted(len(every), rng)
    before = _reference(out, reference)
    y = np.asarray(material.features(every).y)
    for shift, at, cells in (
        *_mixed(out, y, rest, rng),
        *_new(head, known.outside, _cells(out, rest), rng),
        *_corrupted(known, head, every, rest[:WINDOW], out, quick, seed),
    ):
        if len(cells) >= FEWEST:
            found.append(_told(before, cells) | {"shift": shift, "intensity": at})
    return [f | {"set": name, "seed": seed} for f in found]


Shifted = Iterator[tuple[str, float, I64]]


def _mixed(out: dict[str, Array], y: Array, rest: I64, rng: np.random.Generator) -> Shifted:
    for tilt in TILTS * DRAWS:
        odds = np.exp(tilt * rng.normal(size=int(y.max()) + 1))[y[rest]]
        stay = rng.random(len(rest)) < odds / np.quantile(odds, 0.9)
        yield "class mix", tilt, _cells(out, rest[stay][:WINDOW])


def _new(head: Head, outside: Features | None, cells: I64, rng: np.random.Generator) -> Shifted:
    if outside is None:
        return
    strange = _cells(run_head(head, outside))
    for share in SHARES * DRAWS:
        rows = min(WINDOW, int(len(strange) / share))
        new = round(share * rows)
        if rows - new <= len(cells):
            usual = rng.permutation(cells)[: rows - new]
            yield "new classes", share, np.concatenate([usual, rng.permutation(strange)[:new]])


def _corrupted(
    known: Known,
    head: Head,
    every: I64,
    window: I64,
    out: dict[str, Array],
    quick: bool,
    seed: int,
) -> Shifted:
    window = np.sort(window)
    material = dataclasses.replace(known.material, usable=every[window])
    cells = _cells(out, window)
    part = np.random.default_rng(seed).random(len(window)) < PART
    names = list(CORRUPTIONS[kind_of({s.name: s for s in material.frozen.inputs})])
    for severity in QUICK_SEVERITIES if quick else SEVERITIES:
        spoilt, _ = corrupted_sets(material, known.data, names, severity=severity, seed=seed)
        for one in spoilt:
            new = _cells(run_head(head, one.rows))
            yield "corrupted", severity, new
            yield "a fifth corrupted", severity, np.where(part, new, cells)


def _parted(n: int, rng: np.random.Generator) -> tuple[I64, I64]:
    """(rows of the reference, the others), in any order."""
    order = rng.permutation(n)
    k = min(REFERENCE, n // 2)
    return order[:k], order[k:]


def _cells(out: dict[str, Array], rows: I64 | None = None) -> I64:
    cells = shift_kind.cells(out["label"], out["confidence"], out.get("ood_pvalue"))
    return cells if rows is None else cells[rows]


def _reference(out: dict[str, Array], rows: I64) -> shift_kind.Reference:
    empty = shift_kind.start(out["probs"].shape[1])
    return shift_kind.update(empty, _cells(out, rows), out["probs"][rows])


def _told(reference: shift_kind.Reference, cells: I64) -> Told:
    found = shift_kind.compare(reference, cells)
    return {"kind": found.kind, "strange": found.strange, "crowding": found.crowding}


def _cell(found: list[Told], shift: str, at: float | None) -> dict[str, Any]:
    here = [r for r in found if r["shift"] == shift and at in (None, r["intensity"])]
    told: dict[str, Any] = {k: _share([r["kind"] == k for r in here]) for k in shift_kind.KINDS}
    strange = float(np.mean([r["strange"] for r in here]))
    where = {"shift": shift, "intensity": "any" if at is None else at}
    return {**where, "windows": len(here), "strange": strange, **told}


def _share(hits: list[bool]) -> list[float] | None:
    """(share, low, high)."""
    if not hits:
        return None
    n, k = len(hits), sum(hits)
    return [k / n, *share_interval(k, n)]


def _quartiles(x: Array) -> list[float] | None:
    return np.quantile(x, (0.25, 0.5, 0.75)).tolist() if len(x) else None
