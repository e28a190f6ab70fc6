"""What a model is given: checked against its inputs before it may join a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from calibration.conformal.cells import DEFAULTS
from posthoc.contract import Array, TensorSpec
from service.errors import invalid, shorten
from service.tensors import cast, first_row, surely_finite


def validate(
    inputs: Mapping[str, Array],
    specs: Sequence[TensorSpec],
    max_rows: int,
    optional: Sequence[TensorSpec] = (),
    nonfinite: bool = False,
) -> dict[str, Array]:
    """The inputs in the model's dtypes, in the model's order, then the ``optional`` ones, at their
    defaults where they are not given.

    Raises ServiceError 400 for an unknown or missing input, another shape, inputs of different
    lengths, no row or more than ``max_rows``, a value that the dtype cannot hold, and a value that
    is not finite, naming its row, and a ``u`` outside [0, 1]. With ``nonfinite`` the model's own
    inputs may hold NaN and infinity, if they were sent as such.
    """
    known = (*specs, *optional)
    names = [spec.name for spec in known]
    for name in inputs:
        if name not in names:
            raise invalid(f"the model has no input {shorten(name)!r}; it takes {', '.join(names)}")
    feed: dict[str, Array] = {}
    rows = -1
    for spec in specs:
        sent = inputs.get(spec.name)
        if sent is None:
            raise invalid(f"input {spec.name!r} is missing; the model takes {', '.join(names)}")
        _check_shape(sent, spec, rows, max_rows)
        rows = len(sent)
        feed[spec.name] = value = cast(sent, np.dtype(spec.dtype), f"input {spec.name!r}")
        if value.dtype.kind == "f" and not (surely_finite((value,)) or np.isfinite(value).all()):
            # What was finite as it was sent is too large for the dtype.
            _refuse(~np.isfinite(value) & (np.isfinite(sent) | (not nonfinite)), spec)
    for spec in optional:
        sent = inputs.get(spec.name)
        if sent is None:
            feed[spec.name] = np.full(rows, DEFAULTS[spec.name], np.dtype(spec.dtype))
            continue
        _check_shape(sent, spec, rows, max_rows)
        feed[spec.name] = value = cast(sent, np.dtype(spec.dtype), f"input {spec.name!r}")
        if value.dtype.kind == "f":
            _refuse(~np.isfinite(value), spec)
        if spec.name == "u":
            outside = (value < 0) | (value > 1)
            if outside.any():
                raise invalid(f"row {first_row(outside)} of input 'u' must lie between 0 and 1")
    return feed


def _check_shape(value: Array, spec: TensorSpec, rows: int, max_rows: int) -> None:
    """That an input has the shape of its spec, as many rows as those before it (-1: it is the
    first), and not too many."""
    have, want = value.shape, spec.shape
    # Mostly no axis but the first is free.
    if len(have) != len(want) or (have[1:] != want[1:] and not _fits(have, want)):
        tail = ("any" if d < 0 else str(d) for d in want[1:])
        wanted = ", ".join(("N", *tail) if want else ())
        raise invalid(f"input {spec.name!r} has shape {list(have)}; the model takes [{wanted}]")
    if rows not in (-1, have[0]):
        raise invalid(f"input {spec.name!r} has {have[0]} rows and another input has {rows}")
    if not 1 <= have[0] <= max_rows:
        raise invalid(f"input {spec.name!r} has {have[0]} rows; a request holds 1 to {max_rows}")


def _fits(have: Sequence[int], want: Sequence[int]) -> bool:
    return all(w in (-1, h) for w, h in zip(want, have, strict=True))


def _refuse(bad: Array, spec: TensorSpec) -> None:
    if bad.any():
        raise invalid(f"row {first_row(bad)} of input {spec.name!r} is not finite")
