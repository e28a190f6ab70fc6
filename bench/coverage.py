"""``python -m bench coverage``: realised coverage of every set and interval.

Every set of the developer suite × α in {.05, .1, .2} × 20 re-splits by rows × methods
(`bench.coverage_cells`): thresholds from conformal rows, coverage on test rows. A cell is inside
when its coverage lies in the 99 % beta-binomial band of both its sizes, or above the lower edge
where scores tie at the threshold or sets are never empty. ``cells`` have at least 500 rows of
either sample; ``small_cells`` have fewer, and their own bands. Of each method, ``outside`` is
beside ``allowed``, the 99.9 % quantile of how many are by chance (`bench.coverage_null`).
``below_18`` lists set, method and level where fewer than 18 of 20 splits are inside.

``shift`` is `bench.coverage_shift`, ``peers`` `bench.coverage_peers`; ``by_item`` are the sets
whose rows belong together, split by what they belong to, which nothing is judged by.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import numpy as np

from bench import coverage_null as null
from bench.coverage_cells import MARGINAL, UNKNOWN_GROUP, Cell, class_cells, value_cells
from bench.coverage_peers import beside_peers
from bench.coverage_rows import split_rows
from bench.coverage_shift import Shifted, shifted
from bench.coverage_tables import figures
from bench.processes import each
from bench.suite import find, load, suite

SEEDS, QUICK_SEEDS = 20, 3
QUICK = ("satimage", "concrete")
BLOCK = 4  # seeds of a task
LEAST = 500  # rows of either sample

Found = tuple[str, int, Cell]
T = TypeVar("T")


def run(quick: bool) -> dict[str, Any]:
    """Coverage by set, method and level, how many cells are outside, under shift, and of peers."""
    sets = [s for s in suite() if not quick or s.name in QUICK]
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    blocks = [tuple(seeds[i : i + BLOCK]) for i in range(0, len(seeds), BLOCK)]
    for s in sets:  # made on first use, which two processes need not do at once
        load(s.name, grouped=False)
    found: list[Found] = []
    moved: list[tuple[str, Shifted]] = []
    items: list[Found] = []
    for one in each(block, [(s.name, b) for s in sets for b in blocks]):
        found += one[0]
        moved += one[1]
        items += one[2]
    order = {s.name: i for i, s in enumerate(sets)}
    for rows in (found, items):
        rows.sort(key=lambda r: (order[r[0]], r[1]))
    moved.sort(key=lambda r: order[r[0]])
    print("peers", file=sys.stderr, flush=True)
    return {**judge(found, len(seeds)), **figures(moved, items), "peers": beside_peers(quick)}


def block(
    name: str, seeds: tuple[int, ...]
) -> tuple[list[Found], list[tuple[str, Shifted]], list[Found]]:
    """(cells, coverage under shift, cells of splits by item) of some splits of a set."""
    chosen = find(name)
    make = class_cells if chosen.task == "classification" else value_cells
    known = load(name, grouped=False)
    whole = load(name) if chosen.group else None
    found: list[Found] = []
    moved: list[tuple[str, Shifted]] = []
    items: list[Found] = []
    for seed in seeds:
        split = split_rows(name, known, chosen.task, seed)
        found += [(name, seed, c) for c in make(split, seed)]
        moved += [(name, s) for s in shifted(split, seed)]
        if whole is not None:
            apart = split_rows(name, whole, chosen.task, seed)
            items += [(name, seed, c) for c in make(apart, seed) if c.method == "residual"]
    return found, moved, items


def judge(found: list[Found], splits: int) -> dict[str, Any]:
    """Cells inside their bands, of all, of each method, and of each set, method and level."""
    judged = [f for f in found if not f[2].method.endswith((MARGINAL, UNKNOWN_GROUP))]
    large = [f for f in judged if min(f[2].n, f[2].m) >= LEAST]
    small = [f for f in judged if min(f[2].n, f[2].m) < LEAST]
    table = [_row(rows) for rows in _by(found, lambda f: (f[0], f[2].method, f[2].alpha))]
    whole = [f for f in large if not f[2].part]
    each_level = list(_by(whole, lambda f: (f[0], f[2].method, f[2].alpha)))
    return {
        "splits": splits,
        "cells": len(large),
        "cells_inside_band": _share(large),
        "small_cells": len(small),
        "small_cells_inside_band": _share(small),
        "levels": len(each_level),
        "below_18": [
            _row(rows)
            for rows in each_level
            if sum(null.inside(c) for _, _, c in rows) < 0.9 * len(rows)
        ],
        "unknown_group_differs": _differing(found),
        "methods": [_method(rows) for rows in _by(judged, lambda f: f[2].method)],
        "table": table,
        "groups": [
            _row(rows) | {"part": rows[0][2].part}
            for rows in _by(
                [f for f in found if "group" in f[2].method and f[2].part],
                lambda f: (f[0], f[2].part, f[2].method, f[2].alpha),
            )
        ],
    }


def _share(found: list[Found]) -> float | None:
    return float(np.mean([null.inside(c) for _, _, c in found])) if found else None


def _method(rows: list[Found]) -> dict[str, Any]:
    """Of one method: how many cells are outside, of large and of small ones."""
    made: dict[str, Any] = {"method": rows[0][2].method}
    for prefix, here in (
        ("", [r for r in rows if min(r[2].n, r[2].m) >= LEAST]),
        ("small_", [r for r in rows if min(r[2].n, r[2].m) < LEAST]),
    ):
        made |= {
            f"{prefix}cells": len(here),
            f"{prefix}outside": sum(not null.inside(c) for _, _, c in here),
            f"{prefix}allowed": null.allowed(here),
        }
        if not prefix:
            made["lower_edge_only"] = sum(c.lower for _, _, c in here)
            places = [null.position(c) for _, _, c in here]
            made["positions"] = np.histogram(np.clip(places, -4.99, 4.99), null.BINS)[0].tolist()
    return made


def _row(rows: list[Found]) -> dict[str, Any]:
    """Means over splits (and parts) of one set, method and level."""
    cells = [c for _, _, c in rows]
    sizes = [c.size for c in cells if c.size is not None]
    return {
        "set": rows[0][0],
        "method": cells[0].method,
        "alpha": cells[0].alpha,
        "n": round(float(np.mean([c.n for c in cells]))),
        "m": round(float(np.mean([c.m for c in cells]))),
        "coverage": float(np.mean([c.covered / c.m for c in cells])),
        "inside": sum(null.inside(c) for c in cells),
        "of": len(cells),
        "lower_edge_only": sum(c.lower for c in cells),
        "size": float(np.mean(sizes)) if sizes else None,
    }


def _differing(found: list[Found]) -> int:
    """Splits and levels where rows of an unknown group have another threshold than the marginal."""
    held = {(n, s, c.method, c.alpha): c.covered for n, s, c in found if not c.part}
    return sum(
        held[n, s, m.removesuffix(UNKNOWN_GROUP), a] != v
        for (n, s, m, a), v in held.items()
        if m.endswith(UNKNOWN_GROUP)
    )


def _by(rows: Iterable[T], key: Callable[[T], Hashable]) -> Iterable[list[T]]:
    """Rows that share a key, by its first occurrence."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups.values()
