"""Is the batch like the rows that the bundle was calibrated on? What needs no label.

Values are counted in bins that the bundle's reference rows fix, twenty of about equal counts, so
fragments add up. Edges lie midway between values of the reference, which a last bit of rounding
does not carry across.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from calibration.bundle import REFERENCE, Bundle, Manifest
from calibration.drift.distance import LEVEL, distance
from calibration.drift.label_free import EXPECTED_ASSUMES, expected_accuracy
from calibration.metrics.binomial import share_interval
from calibration.metrics.totals import BIN_EDGES, N_BINS
from posthoc.contract import F64, I64, Array

COMPARED = ("confidence", "std", "ood_score", "ood_pvalue")
_BINS = 20
PROMISES = (
    f"KS and PSI say how large a difference is. Of a batch like the reference each stays below its "
    f"floor with probability {LEVEL:g}, if rows are independent; several rows of one customer, or "
    "one day after the other, are not, and pass it more often.",
    "A change of the truth that leaves inputs and answers as before shows in none of these "
    "figures; labels show it (--labels).",
)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a batch is held against, by field: inner ``edges`` of the bins, and ``counts`` of the
    reference rows in them. ``confidence`` and ``flagged`` say whether those fields are written."""

    edges: Mapping[str, F64]
    counts: Mapping[str, I64]
    confidence: bool
    flagged: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """Counts of ``n`` rows in the reference's bins, by field; those flagged; and by confidence bin
    (of `calibration.metrics.totals`) rows and sums of confidence."""

    n: int
    bins: Mapping[str, I64]
    flagged: int
    count: I64
    confidence_sum: F64


def reference_of(bundle: Bundle, fields: Sequence[str]) -> Reference:
    """The reference of those ``fields`` that are written and that the bundle remembers."""
    table = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))
    edges, counts = {}, {}
    for name in COMPARED:
        if name in fields and name in table.column_names:
            values = np.asarray(table[name].to_numpy(), np.float32).astype(np.float64)
            values = np.sort(values[np.isfinite(values)])
            if len(values):
                edges[name] = _edges(values)
                counts[name] = _counted(edges[name], values)
    return Reference(edges, counts, "confidence" in fields, "ood" in fields)


def nothing(reference: Reference) -> Seen:
    """The counts of no rows."""
    bins = {name: np.zeros_like(counts) for name, counts in reference.counts.items()}
    return Seen(0, bins, 0, np.zeros(N_BINS, np.int64), np.zeros(N_BINS))


def look(reference: Reference, seen: Seen, fields: Mapping[str, Array], n: int) -> Seen:
    """The counts with N rows more, by their prediction ``fields``."""
    bins = {}
    count, total = seen.count, seen.confidence_sum
    for name, edges in reference.edges.items():
        bins[name] = seen.bins[name] + _counted(edges, _sorted(fields[name], n))
    if reference.confidence:
        # A float32 softmax may sum to a hair above 1.
        confidence = np.clip(_sorted(fields["confidence"], n), 0.0, 1.0).astype(np.float64)
        more = _counted(BIN_EDGES[:-1], confidence)
        filled = np.flatnonzero(more)
        total = total.copy()
        total[filled] += np.add.reduceat(confidence, (np.cumsum(more) - more)[filled])
        count = count + more
    flagged = int(np.count_nonzero(fields["ood"])) if reference.flagged else 0
    return Seen(seen.n + n, bins, seen.flagged + flagged, count, total)


def merged(a: Seen, b: Seen) -> Seen:
    """The counts of both."""
    return Seen(
        a.n + b.n,
        {name: counts + b.bins[name] for name, counts in a.bins.items()},
        a.flagged + b.flagged,
        a.count + b.count,
        a.confidence_sum + b.confidence_sum,
    )


def to_json(seen: Seen) -> dict[str, Any]:
    """Plain JSON values, from which `from_json` makes the same counts to the last bit."""
    return {
        "n": seen.n,
        "bins": {name: counts.tolist() for name, counts in seen.bins.items()},
        "flagged": seen.flagged,
        "count": seen.count.tolist(),
        "confidence_sum": seen.confidence_sum.tolist(),
    }


def from_json(reference: Reference, kept: Mapping[str, Any]) -> Seen:
    """What `to_json` was given. Raises KeyError, TypeError or ValueError for anything else."""
    bins = {name: np.array(kept["bins"][name], np.int64) for name in reference.counts}
    count = np.array(kept["count"], np.int64)
    total = np.array(kept["confidence_sum"], np.float64)
    like = nothing(reference)
    pairs = [(bins[k], v) for k, v in like.bins.items()]
    if any(a.shape != b.shape for a, b in [*pairs, (count, like.count), (total, like.count)]):
        raise ValueError("these are counts of other bins")
    return Seen(int(kept["n"]), bins, int(kept["flagged"]), count, total)


def report(reference: Reference, seen: Seen, manifest: Manifest) -> dict[str, Any]:
    """``_drift.json``: the distances of each compared field, the share flagged beside the bundle's
    nominal one, and the accuracy that confidence claims.

    null where there is nothing to say: no rows, no such field, no threshold.
    """
    compared = {
        name: {
            **asdict(distance(counts, seen.bins[name])),
            "reference_rows": int(counts.sum()),
            "edges": reference.edges[name].tolist(),
            "reference": counts.tolist(),
            "counts": seen.bins[name].tolist(),
        }
        for name, counts in reference.counts.items()
        if seen.n
    }
    expected = None
    if reference.confidence and seen.n:
        found = expected_accuracy(seen.count, seen.confidence_sum)
        expected = {**asdict(found), "assumes": EXPECTED_ASSUMES}
    return {
        "rows": seen.n,
        "compared": compared,
        "flagged": _flagged(reference, seen, manifest),
        "expected_accuracy": expected,
        "notes": [*PROMISES, _chance(len(compared))] if compared else [],
    }


def _beside(distance: float, floor: float) -> str:
    return f"{'beyond' if distance > floor else 'within'} chance, {floor:.3f}"


def lines(told: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the summary is told of a `report`."""
    found = [
        f"{name}: KS {d['ks']:.3f} ({_beside(d['ks'], d['ks_floor'])}), "
        f"PSI {d['psi']:.3f} ({_beside(d['psi'], d['psi_floor'])})"
        for name, d in told["compared"].items()
    ]
    if (flagged := told["flagged"]) is not None:
        found.append(
            f"flagged as strange: {flagged['share']:.2%} ({flagged['low']:.2%} to "
            f"{flagged['high']:.2%}) of rows, where {flagged['nominal']:.2%} is nominal"
        )
    if (expected := told["expected_accuracy"]) is not None:
        found.append(
            f"expected accuracy: {expected['accuracy']:.3f}, if confidence is still calibrated on "
            "these rows"
        )
    return tuple(found)


def _flagged(reference: Reference, seen: Seen, manifest: Manifest) -> dict[str, Any] | None:
    ood = manifest.ood
    if not reference.flagged or ood is None or ood.threshold is None or not seen.n:
        return None
    low, high = share_interval(seen.flagged, seen.n)
    return {
        "flagged": seen.flagged,
        "share": seen.flagged / seen.n,
        "low": low,
        "high": high,
        "nominal": ood.alpha,
        "promise": f"of rows like those of the fit at most {ood.alpha:g} are flagged in the long "
        f"run, with probability {1 - ood.delta:g} over the {ood.n} rows of the threshold",
    }


def _chance(fields: int) -> str:
    most = 2 * fields * (1 - LEVEL)
    return (
        f"{2 * fields} distances are shown: with probability {most:.2f} at most, one of a batch "
        "like the reference is above its floor."
    )


def _edges(values: F64) -> F64:
    known = np.unique(values)
    cuts = np.quantile(values, np.arange(1, _BINS) / _BINS, method="lower")
    at = np.unique(np.searchsorted(known, cuts))
    at = at[at + 1 < len(known)]
    return np.asarray((known[at] + known[at + 1]) / 2)


def _sorted(values: Array, n: int) -> Array:
    """A field of N rows in ascending order, of several outputs their mean."""
    table = values.reshape(n, -1)
    return np.sort(table[:, 0] if table.shape[1] == 1 else table.mean(axis=1, dtype=np.float64))


def _counted(edges: F64, ascending: Array) -> I64:
    """Values in bins that are closed on the right. Where values are sorted, looking up edges costs
    a fraction of looking up values, sorting included."""
    ends = np.searchsorted(ascending, edges, side="right")
    return np.diff(ends, prepend=0, append=len(ascending))
