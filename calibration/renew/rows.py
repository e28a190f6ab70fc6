"""Served predictions beside the labels that came later, and which of them do what in a renewal.

The ledger keeps what was served and no features, so that rows are told apart by a hash of their id
and a seed, never by time: parts of one time are exchangeable, halves of it are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from calibration.bundle import Manifest
from calibration.conformal.randomise import uniforms
from calibration.metrics.totals import level_name
from calibration.threshold import neyman_pearson_rows
from posthoc.contract import F64, Array, DataError
from posthoc.data import split_roles

PARTS = {"scaling": 0.25, "conformal": 0.4, "measured": 0.35}
CONFORMAL_ONLY = {"conformal": 0.5, "measured": 0.5}
LEAST = 100  # rows of a scaling, and of a comparison: fewer say nothing


@dataclass(frozen=True, slots=True)
class Labelled:
    """N predictions of one bundle and their truth ``y``: N classes, or N×K targets.

    ``keys`` N are hashes of their ids (`id_keys`), ``group`` N their codes, -1 where none was
    given. Of a classification ``label`` N, ``probs`` N×C float32 and ``confidence`` N are as they
    were served; of a regression ``mean`` and ``std``, N×K float32. ``time`` N is when, in seconds
    since the epoch, where that is known.
    """

    keys: Array
    y: Array
    group: Array
    label: Array | None = None
    probs: Array | None = None
    confidence: Array | None = None
    mean: Array | None = None
    std: Array | None = None
    time: Array | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, index: Array | slice) -> Labelled:
        """Some of the rows: a mask, their places, or a slice."""
        cut: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            cut[f.name] = None if value is None else value[index]
        return Labelled(**cut)


@dataclass(frozen=True, slots=True)
class Window:
    """Where labelled rows came from: predictions from ``since`` to ``until`` (seconds since the
    epoch), of which ``served`` were made and ``labelled`` have a label; of ``unfit`` labels nothing
    could be made. ``by_confidence`` holds (bin, served, labelled) of a classification."""

    since: float
    until: float
    served: int
    labelled: int
    unfit: int = 0
    by_confidence: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Need:
    """Rows that one promise or figure takes at the least, and the rows that there are; too few are
    an error unless it can do without (``must``)."""

    what: str
    needs: int
    has: int
    must: bool = True


def id_keys(ids: Sequence[str]) -> Array:
    """A hash of each of N ids, uint64."""
    digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def divided(rows: Labelled, shares: Mapping[str, float], seed: int) -> dict[str, Labelled]:
    """The rows in disjoint parts, by a hash of id and seed."""
    role = split_roles(rows.keys, shares, seed)
    return {name: rows.take(role == i) for i, name in enumerate(shares)}


def needs(manifest: Manifest, parts: Mapping[str, Labelled]) -> tuple[Need, ...]:
    """What the renewal of a bundle takes at the least, beside what there is. Abstention with too
    few rows abstains on all, as that of a fit does."""
    n = len(parts["conformal"])
    found = [
        Need(f"coverage {level_name(g.alpha)}", g.n_needed, n)
        for g in manifest.conformal.guarantees
    ]
    if manifest.recalibration == "emp":
        top = max(manifest.quantile_levels)
        found.append(Need(f"quantile {top:g}", _ceil(top / (1 - top)), n))
    if (a := manifest.abstain) is not None and manifest.task == "classification":
        what = f"abstention: wrong ≤ {a.max_error:g}, {1 - a.delta:g} sure"
        found.append(Need(what, neyman_pearson_rows(a.max_error, a.delta), n, must=False))
    for name in ("scaling", "measured"):
        if name in parts:
            found.append(Need(name, LEAST, len(parts[name])))
    return tuple(found)


def check_rows(found: Sequence[Need], shares: Mapping[str, float], total: int) -> None:
    """DataError naming what has too few rows, and how many labelled rows it takes in all."""
    short = [n for n in found if n.must and n.has < n.needs]
    if short:
        wanted = max(_ceil(n.needs / shares.get(n.what, shares["conformal"])) for n in short)
        what = "; ".join(f"{n.what} takes {n.needs:,} rows and has {n.has:,}" for n in short)
        raise DataError(
            f"too few labelled rows: {what}. In all it takes about {wanted:,} and there are "
            f"{total:,}: take a longer --since, or wait for more labels"
        )


def _ceil(x: float) -> int:
    return int(np.ceil(round(x, 9)))


def drawn(rows: Labelled, seed: int) -> F64:
    """A number in [0, 1) of each row, for randomised scores: a hash of its id, which tells nothing
    of its scores, as good as the one that its caller had."""
    return uniforms(rows.keys, seed + 1)
