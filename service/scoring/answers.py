"""Batches of rows → predictions, with the rows that cannot be answered told apart.

The shape of a batch never depends on its bad rows: a bad row is replaced by a copy of a good row
of its batch and its answer dropped. So a neighbour's answer is, bit for bit, what the model gives
for a batch of that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from posthoc.contract import I64, Array, HedgedError, ModelError
from service.scoring.errors import first_line

Inputs = Mapping[str, Array]
Run = Callable[[Inputs], dict[str, Array]]

# With fewer conformal rows than the level needs, the honest bound is infinite.
MAY_BE_INFINITE = frozenset({"lower", "upper", "quantiles"})


@dataclass(frozen=True, slots=True)
class Answers:
    """Predictions of the good ``rows`` (ascending), and the reasons of the bad ones by row.

    ``fields`` is empty when no row is good.
    """

    fields: dict[str, Array]
    rows: I64
    bad: dict[int, str]


def answer(
    run: Run,
    inputs: Inputs,
    bad: Mapping[int, str],
    batch_size: int,
    wanted: Collection[str] | None = None,
) -> Answers:
    """Run rows in batches of ``batch_size``, the last as long as it is.

    ``bad`` holds rows known to be bad beforehand; a row is bad as well where a field of ``wanted``
    (None: of all) is not finite. Raises ModelError when the model fails on a
    batch but on none of its rows alone.
    """
    count = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        known = {r - start: why for r, why in bad.items() if start <= r < stop}
        part = answer_batch(run, {k: v[start:stop] for k, v in inputs.items()}, known)
        parts.append((start, part))
    found = {start + r: why for start, part in parts for r, why in part.bad.items()}
    some = [part.fields for _, part in parts if part.fields]
    if not some:
        return Answers({}, np.empty(0, np.int64), dict(sorted(found.items())))
    fields = {k: np.concatenate([f[k] for f in some]) for k in some[0]}
    rows = np.concatenate([start + part.rows for start, part in parts])
    checked = {k: v for k, v in fields.items() if wanted is None or k in wanted}
    if wrong := not_finite(checked):
        found.update({int(rows[at]): why for at, why in wrong.items()})
        rows, kept = np.delete(rows, list(wrong)), {}
        if len(rows):
            kept = {k: np.delete(v, list(wrong), axis=0) for k, v in fields.items()}
        fields = kept
    return Answers(fields, rows, dict(sorted(found.items())))


def answer_batch(run: Run, inputs: Inputs, bad: Mapping[int, str]) -> Answers:
    """Run one batch, its bad rows replaced; finiteness of the predictions is not looked at."""
    ok = np.ones(len(next(iter(inputs.values()))), bool)
    ok[list(bad)] = False
    good = np.flatnonzero(ok)
    if not len(good):
        return Answers({}, good, dict(bad))
    try:
        fields = run(_replaced(inputs, bad, good[0]) if bad else inputs)
    except HedgedError:
        raise  # the shape or the dtype of a whole column
    except Exception as e:  # onnxruntime raises a dozen unrelated exception types
        culprits = failing_rows(run, inputs, good)
        if not culprits:
            raise ModelError(
                f"the model fails on {len(ok)} rows at once but on none of them alone "
                f"({first_line(e)}); use a smaller batch size"
            ) from e
        return answer_batch(run, inputs, {**bad, **culprits})
    if bad:
        fields = {k: v[good] for k, v in fields.items()}
    return Answers(fields, good, dict(bad))


def failing_rows(run: Run, inputs: Inputs, rows: Array) -> dict[int, str]:
    """Those of ``rows`` that make the model fail on their own, found by bisection."""
    try:
        run({k: v[rows] for k, v in inputs.items()})
    except HedgedError:
        raise
    except Exception as e:  # as above
        if len(rows) == 1:
            return {int(rows[0]): f"the model fails on this row: {first_line(e)}"}
        half = len(rows) // 2
        return {
            **failing_rows(run, inputs, rows[:half]),
            **failing_rows(run, inputs, rows[half:]),
        }
    return {}


def not_finite(fields: Mapping[str, Array]) -> dict[int, str]:
    """Rows whose prediction holds NaN, or Inf where a bound cannot honestly be infinite."""
    found: dict[int, str] = {}
    for name, values in fields.items():
        if values.dtype.kind != "f":
            continue
        wrong = np.isnan(values) if name in MAY_BE_INFINITE else ~np.isfinite(values)
        for row in np.flatnonzero(wrong.reshape(len(values), -1).any(axis=1)):
            found.setdefault(int(row), f"the model gives no finite {name!r} for this row")
    return found


def _replaced(inputs: Inputs, rows: Iterable[int], by: int) -> Inputs:
    """Inputs in which ``rows`` hold copies of the row ``by``."""
    at = np.fromiter(rows, dtype=np.int64)
    copies = {k: v.copy() for k, v in inputs.items()}
    for values in copies.values():
        values[at] = values[by]
    return copies
