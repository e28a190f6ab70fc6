"""Texts and JSON values → numbers for an input of the model, with the rows told apart that are
none.

A whole number stays exact (int64, or uint64 where the input is); anything else is float64. ``true``
and ``false`` are 1 and 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from posthoc.columns import Faults
from posthoc.contract import TensorSpec

_FLOAT = r"^[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|(?i:nan|inf|infinity))$"
_INTEGER = r"^-?[0-9]+$"
_INTEGER_TEXT = re.compile(r"[+-]?[0-9]+")
_FLOAT_TEXT = re.compile(_FLOAT)
_TRUTH = {"true": 1, "false": 0}
_EXACT = 1 << 53
_SHOWN = 40


def number_type(spec: TensorSpec) -> pa.DataType:
    """The type in which numbers for an input are read."""
    if np.dtype(spec.dtype).kind == "f":
        return pa.float64()
    return pa.uint64() if spec.dtype == "uint64" else pa.int64()


def from_texts(column: pa.Array, spec: TensorSpec) -> tuple[pa.Array, Faults]:
    """A column of text as numbers; null stays null. Spaces around a number are no part of it."""
    kind = number_type(spec)
    if pa.types.is_floating(kind) or pc.all(pc.match_substring_regex(column, _INTEGER)).as_py():
        try:
            return pc.cast(column, kind), {}
        except pa.ArrowInvalid:
            pass
    if not pa.types.is_floating(kind):
        return from_values(column.to_pylist(), spec)
    plain = pc.ascii_lower(pc.ascii_trim_whitespace(column))
    for word, number in _TRUTH.items():
        plain = pc.if_else(pc.equal(plain, word), str(number), plain)
    good = pc.match_substring_regex(plain, _FLOAT)
    values = pc.cast(pc.if_else(good, plain, pa.scalar(None, pa.string())), kind)
    wrong = np.flatnonzero(~pc.fill_null(good, True).to_numpy(zero_copy_only=False))
    return values, {int(r): _no_number(column[int(r)].as_py()) for r in wrong}


def from_values(values: Sequence[Any], spec: TensorSpec) -> tuple[pa.Array, Faults]:
    """A column of JSON values as numbers or, where the input takes several a row, lists of them;
    null stays null."""
    kind = number_type(spec)
    found = set(map(type, values)) - {type(None)}
    if list in found:
        return _lists(values, spec)
    if found <= ({int, float} if pa.types.is_floating(kind) else {int}):
        try:
            return pa.array(values, kind), {}
        except (pa.ArrowInvalid, OverflowError):
            pass
    faults: Faults = {}
    numbers = []
    for row, value in enumerate(values):
        number = None if value is None else _number(value, kind)
        if isinstance(number, str):
            faults[row] = number
        numbers.append(None if row in faults else number)
    return pa.array(numbers, kind), faults


def _number(value: Any, kind: pa.DataType) -> int | float | str:
    """A value as a number, or what is wrong with it."""
    number = value
    if isinstance(value, str):
        plain = value.strip()
        if plain.lower() in _TRUTH:
            number = _TRUTH[plain.lower()]
        elif _INTEGER_TEXT.fullmatch(plain):
            number = int(plain) if len(plain) < _SHOWN else float(plain)
        elif _FLOAT_TEXT.match(plain):
            number = float(plain)
    if not isinstance(number, int | float):
        return _no_number(value)
    if pa.types.is_floating(kind):
        return float(number) if abs(number) < 1e308 or isinstance(number, float) else np.inf
    if isinstance(number, float) and number.is_integer() and abs(number) < _EXACT:
        number = int(number)
    limits = np.iinfo(str(kind))
    if not isinstance(number, int) or not limits.min <= number <= limits.max:
        return f"is {_shown(value)}, which {kind} cannot hold"
    return int(number)


def _lists(values: Sequence[Any], spec: TensorSpec) -> tuple[pa.Array, Faults]:
    """Lists as deep as the first of them. What does not fit in that is the row's fault."""
    kind = number_type(spec)
    first: Any = next(v for v in values if isinstance(v, list))
    while isinstance(first, list):
        kind = pa.list_(kind)
        first = first[0] if first else None
    try:
        if pa.types.is_floating(number_type(spec)):
            return pa.array(values, kind), {}
    except (pa.ArrowException, OverflowError):
        pass
    faults: Faults = {}
    rows = []
    for row, value in enumerate(values):
        fitted = None
        if value is not None:
            try:
                fitted = _nested(value, kind)
                pa.array([fitted], kind)
            except (pa.ArrowException, OverflowError, ValueError) as e:
                reason = str(e) if type(e) is ValueError else "holds what is no number"
                fitted, faults[row] = None, reason
        rows.append(fitted)
    return pa.array(rows, kind), faults


def _nested(value: Any, kind: pa.DataType) -> Any:
    """A value with all numbers of one kind. Raises ValueError for one that is something else."""
    if not pa.types.is_list(kind):
        if value is None:
            return None
        number = _number(value, kind)
        if isinstance(number, str):
            raise ValueError(f"holds a value that {number}")
        return number
    if not isinstance(value, list):
        raise ValueError(f"holds {_shown(value)} where a list is expected")
    return [_nested(v, kind.value_type) for v in value]


def _no_number(value: Any) -> str:
    return f"is {_shown(value)}, which is no number"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
