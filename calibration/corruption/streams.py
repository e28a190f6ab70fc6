"""Random numbers of a row that depend on the row alone, and the walk over rows that uses them.

A row has a key: its index, or a hash of its content. What is drawn for it is a function of (seed,
what is done, name of the input, key, position in the row), never of the batch that it comes in.
Severities share their draws, so that a higher one goes on from where a lower one stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from math import pi, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posthoc.contract import F64, Array, DataError

SEVERITIES = (1, 2, 3, 4, 5)
EXACT = 2**53  # integers up to it are exact in float64
_HELD = 1 << 20  # numbers held at a time
_STEP = 0x9E3779B97F4A7C15

Keys = NDArray[np.uint64]
Named = dict[str, Array]
Inputs = Mapping[str, Array] | Array


def level(levels: tuple[float, ...], severity: int) -> float:
    """The one of five levels that ``severity`` (1 to 5) asks for. Raises DataError for others."""
    if severity not in SEVERITIES:
        raise DataError(f"severity {severity!r} is none of 1, 2, 3, 4 and 5 (0 would do nothing)")
    return levels[int(severity) - 1]


def named(inputs: Inputs) -> Named:
    """Tensors by name, an array on its own under "". Raises DataError where there is none, where
    one is a scalar, and where they differ in the number of rows."""
    tensors = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    arrays = {name: np.asarray(x) for name, x in tensors.items()}
    for name, x in arrays.items():
        if not x.ndim:
            raise DataError(f"{called(name)} is a scalar; its first axis must be that of the rows")
    if len({len(x) for x in arrays.values()}) != 1:
        found = {name: len(x) for name, x in arrays.items()}
        raise DataError(f"inputs to corrupt have the same rows, not {found}")
    return arrays


def like(inputs: Inputs, tensors: Named) -> Inputs:
    """``tensors`` in the form that ``inputs`` had."""
    return tensors if isinstance(inputs, Mapping) else tensors[""]


def called(name: str) -> str:
    """What a message calls a tensor."""
    return f"input {name!r}" if name else "the input"


def keys_of(tensors: Named, keys: Array | None) -> Keys:
    """``keys`` (N integers) as uint64, or hashes of the rows' bytes; equal rows share a hash.

    Raises DataError for keys that are no integers, or not one a row.
    """
    n = len(next(iter(tensors.values())))
    if keys is None:
        return _content(tensors, n)
    given = np.asarray(keys)
    if given.shape != (n,) or given.dtype.kind not in "iu":
        raise DataError(f"keys are {n} integers, one a row, not {given.dtype} of {given.shape}")
    return given.astype(np.uint64)


def streams(keys: Keys, seed: int, *what: str) -> Keys:
    """Where each row's stream of numbers starts, N×1."""
    text = "\0".join((str(int(seed)), *what))
    salt = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u8")
    return _mix(_mix(keys + np.uint64(_STEP)) ^ salt.astype(np.uint64))[:, None]


def uniforms(starts: Keys, count: int) -> F64:
    """N×``count`` numbers in [0, 1): SplitMix64 (Steele, Lea & Flood 2014) from each start."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)
    return (_mix(starts + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(starts: Keys, count: int) -> F64:
    """N×``count`` standard normal numbers (Box & Muller 1958)."""
    half = -(-count // 2)
    u = uniforms(starts, 2 * half)
    radius = np.sqrt(-2 * np.log1p(-u[:, :half]))
    angle = 2 * pi * u[:, half:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both[:, :count]


def blocks(x: Array) -> Iterator[slice]:
    """Slices of rows that hold a bounded number of numbers; none for no rows."""
    step = max(1, _HELD // max(1, prod(x.shape[1:])))
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def held(values: F64, dtype: np.dtype[Any], low: float, high: float) -> Array:
    """``values`` cut to [low, high] and to what ``dtype`` holds, in ``dtype``; integers rounded."""
    info = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    low, high = max(low, float(info.min)), min(high, float(info.max))
    if dtype.kind in "iu":
        return np.clip(np.rint(values), np.ceil(low), np.floor(high)).astype(dtype)
    return np.clip(values, low, high).astype(dtype)


def _content(tensors: Named, n: int) -> Keys:
    keys = np.zeros(n, np.uint64)
    for name in sorted(tensors):
        x = tensors[name]
        for rows in blocks(x) if x.size else ():
            part = np.ascontiguousarray(x[rows])
            width = part.nbytes // len(part)
            raw = np.zeros((len(part), -(-width // 8) * 8), np.uint8)
            raw[:, :width] = part.reshape(len(part), -1).view(np.uint8)
            words = raw.view("<u8")
            weights = _mix(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
            keys[rows] = _mix(keys[rows] + (words * weights).sum(1, dtype=np.uint64))
    return keys


def _mix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
