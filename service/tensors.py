"""JSON values to numpy arrays, strictly: what every front end shares."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from math import isfinite
from operator import attrgetter
from typing import Any

import numpy as np
import orjson

from posthoc.contract import Array
from service.errors import invalid

MAX_RANK = 16
_FEW = 256


def parse_object(text: bytes | memoryview) -> dict[str, Any]:
    """A JSON object. Raises ServiceError 400 for other JSON, NaN, and nesting beyond 1,024."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise invalid(f"the body is a JSON {kind(value)}; an object is needed")
    return value


def parse_json(text: bytes | memoryview, where: str = "the body") -> Any:
    """Strict JSON: no NaN, no Infinity, at most 1,024 levels; else ServiceError 400."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise invalid(f"{where} is not JSON: {e}") from None


def number_array(data: list[Any], where: str, nulls: bool = False) -> Array:
    """Nested JSON lists of numbers, or of booleans, as an int64, uint64, float64 or bool array.

    With ``nulls``, null is a missing value: NaN in an array of float64. Raises ServiceError 400 for
    ragged lists, more than MAX_RANK levels, and anything else inside.
    """
    # numpy would make one string column of the longest string's width out of ["…64 MB…", 1, 1]:
    # so the leaves are looked at before an array is made of them.
    shape = [len(data)]
    types = set(map(type, data))
    while list in types:
        sizes = set(map(len, data)) if types == {list} else set()
        if len(sizes) != 1:
            raise invalid(f"{where} is ragged; lists of equal length are needed")
        if len(shape) == MAX_RANK:
            raise invalid(f"{where} is nested deeper than {MAX_RANK} levels")
        shape.append(sizes.pop())
        data = list(chain.from_iterable(data))
        types = set(map(type, data))
    numbers = {int, float, type(None)} if nulls else {int, float}
    if not types <= numbers and types != {bool}:
        odd = next(v for v in data if type(v) not in numbers)
        raise invalid(f"{where} holds a {kind(odd)} where a number is needed")
    value = _array(data, types)
    return value if len(shape) == 1 else value.reshape(shape)


def _array(data: list[Any], types: set[type]) -> Array:
    if types != {int}:
        return np.array(data, np.bool_ if types == {bool} else np.float64)
    try:
        return np.array(data, np.int64)
    except OverflowError:
        pass
    try:
        return np.array(data, np.uint64)
    except OverflowError:  # both ends of the 64-bit range in one list: too large for either type
        return np.array(data, np.float64)


def cast(value: Array, dtype: np.dtype[Any], where: str) -> Array:
    """``value`` as ``dtype``, holding the same numbers.

    Any number becomes a float (rounded), whole numbers in range become integers, only booleans
    become booleans. Raises ServiceError 400 naming the first row that does not fit.
    """
    if value.dtype == dtype:
        return value
    if (value.dtype.kind == "b") != (dtype.kind == "b"):
        held = "booleans" if value.dtype.kind == "b" else "numbers"
        raise invalid(f"{where} holds {held}; the model takes {dtype.name}")
    if dtype.kind in "iu" and value.size:
        limits = np.iinfo(dtype)
        # 2.0 ** bits is exact where float(limits.max) would round up and let it through.
        high = float(2.0 ** (limits.bits - (dtype.kind == "i")))
        bad = (
            ~((value >= limits.min) & (value < high) & (value == np.floor(value)))
            if value.dtype.kind == "f"
            else (value < limits.min) | (value > limits.max)
        )
        if bad.any():
            raise invalid(f"row {first_row(bad)} of {where} does not fit {dtype.name}")
    return _as(value, dtype)


@np.errstate(over="ignore")  # what overflows is found as infinite, with its row
def _as(value: Array, dtype: np.dtype[Any]) -> Array:
    return value.astype(dtype)


def surely_finite(arrays: Collection[Array]) -> bool:
    """Whether arrays of numbers hold neither NaN nor infinity; False where they are large, too."""
    if sum(map(attrgetter("size"), arrays)) > _FEW:
        return False
    # A finite sum has finite terms, and of few values Python has it sooner than numpy.
    values = map(np.ndarray.tolist, map(np.ndarray.ravel, arrays))
    return isfinite(sum(chain.from_iterable(values)))


def first_row(bad: Array) -> int:
    """Index along axis 0 of the first row with a true element."""
    return int(bad.reshape(len(bad), -1).any(axis=1).argmax())


def kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "boolean",
        type(None): "null",
    }
    return kinds.get(type(value), "number")
