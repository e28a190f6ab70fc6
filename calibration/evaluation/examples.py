"""Single rows worth a look, and how sets and intervals are spread over parts of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from calibration.evaluation.parts import Named, Places
from calibration.evaluation.records import Spread, Spreads, WorstRow
from calibration.metrics.totals import level_name
from posthoc.contract import F64, Array

WORST = 20
_PARTS = 12  # most frequent ones that are shown
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def wrong_and_sure(
    fields: Mapping[str, Array], y: Array, places: Places | None, classes: Sequence[str] | None
) -> tuple[WorstRow, ...]:
    """The wrong answers of N rows that were given the most confidence, at most 20."""
    if places is None:
        return ()
    label, confidence = np.asarray(fields["label"]), np.asarray(fields["confidence"], np.float64)
    wrong = np.flatnonzero(label != y)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:WORST]
    flagged = held(fields)

    def name(c: int) -> str:
        return f"class {c}" if classes is None else classes[c]

    return tuple(
        WorstRow(
            row=int(places.rows[i]),
            id=None if places.ids is None else str(places.ids[i]),
            truth=name(int(y[i])),
            answer=name(int(label[i])),
            doubt=float(confidence[i]),
            flagged=None if flagged is None else bool(flagged[i]),
        )
        for i in order
    )


def furthest_off(
    fields: Mapping[str, Array], mean: F64, std: F64, truth: F64, places: Places | None
) -> tuple[WorstRow, ...]:
    """The rows (N×K) whose largest error over its error bar is largest, at most 20."""
    if places is None:
        return ()
    with np.errstate(over="ignore"):  # an error bar of zero: infinitely far off, cut below
        off = np.abs(truth - mean) / np.maximum(std, np.finfo(np.float64).tiny)
    which = off.argmax(axis=1)
    worst = off[np.arange(len(off)), which]
    flagged = held(fields)
    found = []
    for i in np.argsort(-worst, kind="stable")[:WORST]:
        k = which[i]
        at = f"output {k}: " if mean.shape[1] > 1 else ""
        found.append(
            WorstRow(
                row=int(places.rows[i]),
                id=None if places.ids is None else str(places.ids[i]),
                truth=f"{at}{truth[i, k]:.5g}",
                answer=f"{mean[i, k]:.5g} ± {std[i, k]:.3g}",
                doubt=float(min(worst[i], np.finfo(np.float64).max)),
                flagged=None if flagged is None else bool(flagged[i]),
            )
        )
    return tuple(found)


def held(fields: Mapping[str, Array]) -> Array | None:
    """Rows that were flagged or abstained on; None where there is neither."""
    found = [np.asarray(fields[f], bool) for f in ("abstain", "ood") if f in fields]
    return np.asarray(np.logical_or.reduce(found)) if found else None


def spread_over(
    alpha: float, size: F64, covered: Array, named: Named | None, otherwise: tuple[str, Array]
) -> Spreads:
    """Sizes (N, finite) at ``alpha`` within the named groups, or else within the parts that
    ``otherwise`` names: what they are by, and the N names. The most frequent ones are kept."""
    by, names = ("group", named.names) if named is not None else otherwise
    parts, codes, counts = np.unique(
        np.asarray(names).astype(str), return_inverse=True, return_counts=True
    )
    kept = np.argsort(-counts, kind="stable")[:_PARTS]
    found = []
    for c in sorted(kept) if by == FIFTHS else kept:
        inside = codes == c
        found.append(
            Spread(
                name=str(parts[c]),
                n=int(counts[c]),
                coverage=float(covered[inside].mean()),
                mean=float(size[inside].mean()),
                quantiles=tuple(
                    np.quantile(size[inside], _QUANTILES, method="inverted_cdf").tolist()
                ),
            )
        )
    return Spreads(by=by, level=level_name(alpha), parts=tuple(found))


FIFTHS = "fifth of the mean"


def fifths(mean: F64) -> Array:
    """The fifth of N rows that each lies in by its answer (N×K: the first output's)."""
    order = np.argsort(mean[:, 0], kind="stable")
    names = np.empty(len(order), object)
    for i, part in enumerate(np.array_split(order, 5)):
        if len(part):
            low, high = mean[part, 0].min(), mean[part, 0].max()
            names[part] = f"{i + 1}: {low:.3g} to {high:.3g}"
    return names.astype(str)
