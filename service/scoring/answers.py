"""Batches of rows → predictions, with the rows that cannot be answered told apart.

The shape of a batch never depends on its bad rows: a bad row is replaced by a copy of a good row
of its batch and its answer dropped. So a neighbour's answer is, bit for bit, what the model gives
for a batch of that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posthoc.contract import Array, HedgedError, ModelError
from service.scoring.fragments import first_line

Inputs = Mapping[str, Array]
Run = Callable[[Inputs], dict[str, Array]]

# With fewer conformal rows than the level needs, the honest bound is infinite.
MAY_BE_INFINITE = frozenset({"lower", "upper", "quantiles"})


def answer(
    run: Run, inputs: Inputs, bad: Mapping[int, str], batch_size: int
) -> tuple[dict[str, Array], dict[int, str]]:
    """Predictions of the good rows, in order, and the reasons of the bad ones by row.

    ``bad`` holds rows known to be bad beforehand. Rows are run in batches of ``batch_size``, the
    last as long as it is. The predictions are empty when no row is good. Raises ModelError when
    the model fails on a batch but on none of its rows alone.
    """
    count = len(next(iter(inputs.values())))
    parts: list[dict[str, Array]] = []
    reasons: dict[int, str] = {}
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        batch = {k: v[start:stop] for k, v in inputs.items()}
        known = {r - start: why for r, why in bad.items() if start <= r < stop}
        fields, found = answer_batch(run, batch, known)
        if fields:
            parts.append(fields)
        reasons.update({r + start: why for r, why in sorted(found.items())})
    if not parts:
        return {}, reasons
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, reasons


def answer_batch(
    run: Run, inputs: Inputs, bad: Mapping[int, str]
) -> tuple[dict[str, Array], dict[int, str]]:
    """One batch: predictions of its good rows, and the reasons of the bad ones."""
    found = dict(bad)
    rows = np.arange(len(next(iter(inputs.values()))))
    good = np.array([r for r in rows if r not in found], dtype=np.int64)
    if not len(good):
        return {}, found
    try:
        fields = run(_replaced(inputs, found, good[0]))
    except HedgedError:
        raise  # the shape or the dtype of a whole column
    except Exception as e:  # onnxruntime raises a dozen unrelated exception types
        culprits = failing_rows(run, inputs, good)
        if not culprits:
            raise ModelError(
                f"the model fails on {len(rows)} rows at once but on none of them alone "
                f"({first_line(e)}); use a smaller batch size"
            ) from e
        return answer_batch(run, inputs, {**found, **culprits})
    found.update({r: why for r, why in not_finite(fields).items() if r not in found})
    keep = np.array([r not in found for r in rows])
    return ({k: v[keep] for k, v in fields.items()} if keep.any() else {}), found


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


def _replaced(inputs: Inputs, rows: Mapping[int, str] | Sequence[int], by: int) -> Inputs:
    """Inputs in which ``rows`` hold copies of the row ``by``."""
    if not rows:
        return inputs
    at = np.fromiter(rows, dtype=np.int64)
    copies = {k: v.copy() for k, v in inputs.items()}
    for values in copies.values():
        values[at] = values[by]
    return copies
