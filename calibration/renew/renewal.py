"""A fitted bundle made anew on fresh labels: scaling and thresholds, the module untouched.

divide the rows by a hash of their id → a factor on scaling rows → new ranks on conformal rows →
before and after on measured rows. No row does two of these.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calibration.bundle import AbstainRecord, Bundle, Manifest
from calibration.head import Head
from calibration.metrics.totals import level_name
from calibration.renew import factor as factors
from calibration.renew.factor import Factor
from calibration.renew.halves import Halves, halves, warning
from calibration.renew.measure import Comparison, compare, figures
from calibration.renew.opened import Opened, take_apart
from calibration.renew.reference import former_confidences
from calibration.renew.rows import (
    CONFORMAL_ONLY,
    PARTS,
    Labelled,
    Need,
    Window,
    check_rows,
    divided,
    drawn,
    needs,
)
from calibration.renew.thresholds import (
    Ranked,
    chosen_again,
    confidences,
    ranked,
    served,
    sureness,
    wrong,
)
from calibration.renew.told import changes, notes, stamp
from calibration.shift.weighted import Weighted
from posthoc.contract import Array, BundleError, DataError

Only = Literal["conformal"]
_BY_RATIO = (
    "{path}: its thresholds depend on how a row's outputs and features are weighed (--shift "
    "covariate), and the ledger keeps neither. Labelled rows of production need no weights: fit "
    "again on them with `hedged fit`"
)


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a renewal found, before anything is written.

    ``parts`` are the rows of each part; ``renewed`` and ``kept`` say what became of what;
    ``conformal`` are the conformal rows as they are served now; ``halves`` is None where rows are
    too few to be halved, or have no time.
    """

    opened: Opened
    made: Ranked
    factor: Factor | None
    parts: dict[str, int]
    needs: tuple[Need, ...]
    comparison: Comparison
    renewed: tuple[str, ...]
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    halves: Halves | None
    conformal: Labelled
    window: Window
    seed: int


def renew(
    bundle: Bundle,
    rows: Labelled,
    window: Window,
    *,
    only: Only | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> Renewal:
    """New scaling and thresholds of a bundle from labelled ``rows`` that it served.

    ``only`` conformal leaves the scaling as it is; ``tolerance`` is the error above which a
    regression is wrong, without which its abstention stays. Raises BundleError for a bundle of maps
    and for one whose thresholds need more than the ledger keeps, DataError for rows without
    probabilities and for too few rows (saying how many it takes), FitError for a scaling that no
    temperature can follow.
    """
    opened = take_apart(bundle)
    m, head = opened.manifest, opened.head
    _check(bundle, head, rows, tolerance)
    if only is None and m.task == "classification":
        factors.check_scaling(head)
    shares = PARTS if only is None else CONFORMAL_ONLY
    parts = divided(rows, shares, seed)
    needed = needs(m, parts)
    check_rows(needed, shares, len(rows))
    factor, new = _scaled(opened, parts.get("scaling"))
    t = 1.0 if factor is None else factor.value
    now = {name: _as_served(new, part, factor) for name, part in parts.items()}
    grid = _grid(bundle, m, now.get("scaling"), tolerance)
    made = ranked(
        new, m, now["conformal"], moved=t != 1.0, seed=seed, grid=grid, tolerance=tolerance
    )
    if m.abstain is not None and grid is None:
        made = _moved_limit(made, m.abstain, t)
    made = dataclasses.replace(made, head=_read_less(made.head))
    comparison = _compared(opened, made, parts["measured"], now["measured"], seed, tolerance)
    _check_cells(m, made, len(rows))
    by_time = halves(made, now["conformal"], now["measured"], seed)
    said = notes(m, window, len(rows), abstains_as_before=m.abstain is not None and grid is None)
    if by_time is not None and by_time.unlike:
        said = (warning(by_time), *said)
    renewed, kept = changes(opened, made, factor, grid is not None, only)
    return Renewal(
        opened,
        made,
        factor,
        {k: len(v) for k, v in parts.items()},
        _with_cells(needed, m, made),
        comparison,
        renewed,
        kept,
        said,
        by_time,
        now["conformal"],
        window,
        seed,
    )


def _check(bundle: Bundle, head: Head, rows: Labelled, tolerance: float | None) -> None:
    if isinstance(head.cells, Weighted) and head.cells.by == "covariate":
        raise BundleError(_BY_RATIO.format(path=bundle.path))
    if head.task == "classification":
        if tolerance is not None:
            raise DataError("--tolerance is for regression; a class is right or wrong")
        if len(rows) and rows.probs is None:
            raise DataError(
                "the ledger keeps no probabilities of so many classes, and without them there is "
                "nothing to rank: fit again on fresh rows with `hedged fit`"
            )
    elif len(rows) and rows.std is None:
        raise DataError("the ledger has no standard deviations of these predictions")


def _scaled(opened: Opened, rows: Labelled | None) -> tuple[Factor | None, Head]:
    """The factor, and the head behind it with what its scaling rows choose."""
    head = opened.head
    if rows is None:
        return None, head
    if head.task == "classification":
        assert rows.probs is not None
        found = factors.of_classes(rows.probs, rows.y)
    else:
        assert rows.mean is not None and rows.std is not None
        found = factors.of_values(head, rows.y, rows.mean, rows.std)
    head = factors.scaled(head, found.value, opened.features)
    return found, chosen_again(head, served(rows, found.value), opened.manifest.alphas)


def _as_served(head: Head, rows: Labelled, factor: Factor | None) -> Labelled:
    """The rows as the new head serves them."""
    if factor is None:
        return rows
    now = served(rows, factor.value)
    if head.sureness is None:
        return now
    return dataclasses.replace(now, confidence=confidences(head, now).astype(np.float32))


def _grid(
    bundle: Bundle, m: Manifest, scaling: Labelled | None, tolerance: float | None
) -> tuple[Array, Array | None] | None:
    """What abstention may be tried at, from rows that are not the conformal ones; None where it
    stays as it is."""
    if m.abstain is None or (m.task == "regression" and (tolerance is None or scaling is None)):
        return None
    if scaling is not None:
        return sureness(scaling), wrong(scaling, tolerance)
    former = former_confidences(bundle)
    return (former, None) if len(former) else None


def _moved_limit(made: Ranked, old: AbstainRecord, t: float) -> Ranked:
    """The limit that answers the rows it answered before: deviations are t times what they were."""
    least = float(np.finfo(np.float32).min)
    if made.head.task == "classification" or old.threshold is None:
        return made
    limit = max(old.threshold * t, least)
    record = old.model_copy(update={"threshold": limit})
    return dataclasses.replace(made, head=made.head.with_(abstain=limit), abstain=record)


def _read_less(head: Head) -> Head:
    """The head without features where nothing reads them."""
    from posthoc import registry

    members = () if head.ood is None else head.ood.members
    if head.module is None and not any("features" in registry.info(m.name).needs for m in members):
        return head.with_(features=None)
    return head


def _compared(
    opened: Opened,
    made: Ranked,
    before: Labelled,
    after: Labelled,
    seed: int,
    tolerance: float | None,
) -> Comparison:
    u = drawn(before, seed)
    told = before.label is not None or tolerance is not None
    bad = wrong(before, tolerance) if told else None
    former, key = opened.bundle.conformal_scores, "set" if before.label is not None else "interval"
    old = figures(opened.head, opened.manifest.conformal.guarantees, former[key], before, u, bad)
    new = figures(made.head, made.conformal.guarantees, made.scores[key], after, u, bad)
    return compare(old, new, before, after, seed)


def _check_cells(m: Manifest, made: Ranked, total: int) -> None:
    """DataError where a class, cluster or group that had a threshold would lose it."""
    for old, new in zip(m.conformal.guarantees, made.conformal.guarantees, strict=True):
        lost = [
            b
            for a, b in zip(old.cells, new.cells, strict=True)
            if a.threshold is not None and b.threshold is None
        ]
        if lost:
            least = min(lost, key=lambda c: c.n)
            wanted = int(np.ceil(total * new.n_needed / max(1, least.n)))
            raise DataError(
                f"too few labelled rows: {len(lost)} of {len(new.cells)} {m.conformal.given} "
                f"thresholds at {level_name(new.alpha)} would be lost ({least.name} has "
                f"{least.n:,} conformal rows and takes {new.n_needed:,}). In all it takes about "
                f"{wanted:,} rows and there are {total:,}: take a longer --since, or wait for more "
                "labels"
            )


def _with_cells(needed: tuple[Need, ...], m: Manifest, made: Ranked) -> tuple[Need, ...]:
    """Of classes, clusters or groups the rarest counts, level by level."""
    rarest = [
        Need(f"coverage {level_name(g.alpha)} of the rarest {m.conformal.given}", g.n_needed, c.n)
        for g in made.conformal.guarantees
        if g.cells
        for c in [min(g.cells, key=lambda c: c.n)]
    ]
    if not rarest:
        return needed
    return (*rarest, *(n for n in needed if not n.what.startswith("coverage")))


def _plain(found: Halves | None) -> dict[str, Any] | None:
    return None if found is None else {**dataclasses.asdict(found), "unlike": found.unlike}


def summary(found: Renewal) -> dict[str, Any]:
    """Everything that a renewal says, as plain JSON."""
    window = dataclasses.asdict(found.window)
    return {
        "model": found.opened.manifest.name,
        "version": found.opened.manifest.version,
        "identity": found.opened.bundle.identity,
        "window": {
            **window,
            "since": stamp(found.window.since),
            "until": stamp(found.window.until),
        },
        "seed": found.seed,
        "rows": found.parts,
        "needs": [dataclasses.asdict(n) for n in found.needs],
        "factor": None if found.factor is None else dataclasses.asdict(found.factor),
        "renewed": found.renewed,
        "kept": found.kept,
        "comparison": found.comparison.as_dict(),
        "halves": _plain(found.halves),
        "notes": found.notes,
    }
