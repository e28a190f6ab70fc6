"""What a model is given: checked against its inputs before it may join a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from calibration.conformal.cells import DEFAULTS
from posthoc.contract import Array, TensorSpec
from service.errors import invalid, shorten
from service.tensors import cast, first_row


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
    names = [spec.name for spec in (*specs, *optional)]
    for name in inputs:
        if name not in names:
            raise invalid(f"the model has no input {shorten(name)!r}; it takes {', '.join(names)}")
    feed: dict[str, Array] = {}
    rows = -1
    for spec in (*specs, *optional):
        where = f"input {spec.name!r}"
        if spec in optional and spec.name not in inputs:
            feed[spec.name] = np.full(rows, DEFAULTS[spec.name], np.dtype(spec.dtype))
            continue
        if spec.name not in inputs:
            raise invalid(f"{where} is missing; the model takes {', '.join(names)}")
        value = inputs[spec.name]
        if value.ndim != len(spec.shape) or any(
            want not in (-1, have) for want, have in zip(spec.shape, value.shape, strict=True)
        ):
            tail = ("any" if d < 0 else str(d) for d in spec.shape[1:])
            wanted = ", ".join(("N", *tail) if spec.shape else ())
            raise invalid(f"{where} has shape {list(value.shape)}; the model takes [{wanted}]")
        if rows not in (-1, len(value)):
            raise invalid(f"{where} has {len(value)} rows and another input has {rows}")
        rows = len(value)
        if not 1 <= rows <= max_rows:
            raise invalid(f"{where} has {rows} rows; a request holds 1 to {max_rows}")
        sent, value = value, cast(value, np.dtype(spec.dtype), where)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad = ~np.isfinite(value)
            if nonfinite and spec not in optional:
                bad &= np.isfinite(sent)  # too large for the dtype
            if bad.any():
                raise invalid(f"row {first_row(bad)} of {where} is not finite")
        if spec in optional and spec.name == "u":
            outside = (value < 0) | (value > 1)
            if outside.any():
                raise invalid(f"row {first_row(outside)} of {where} must lie between 0 and 1")
        feed[spec.name] = value
    return feed
