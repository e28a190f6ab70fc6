"""Sequences of tokens, N×T integers, in which positions hold tokens of elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike

from calibration.corruption import streams
from calibration.corruption.streams import Inputs
from posthoc.contract import F64, I64, Array, DataError

REPLACED = (0.02, 0.05, 0.1, 0.2, 0.4)  # share of positions
ASIDE = ("mask", "type", "segment", "position")  # in the names of tensors that hold no tokens


@dataclass(frozen=True)
class Tokens:
    """The distinct tokens of a data set, in order, how often each occurs, and those ``kept``."""

    values: I64
    counts: I64
    kept: tuple[int, ...] = ()

    @cached_property
    def pool(self) -> tuple[I64, I64]:
        """Those that may stand in for another, and how often each occurs."""
        free = ~np.isin(self.values, self.kept)
        return self.values[free], self.counts[free]


Reference = Mapping[str, Tokens]


def measure(inputs: Inputs, *, keep: Collection[int] = ()) -> dict[str, Tokens]:
    """The tokens of each tensor of integers N×T, those apart whose names say that they are a mask,
    types, segments or positions. Tokens in ``keep``, such as padding, are neither replaced nor
    do they replace. Raises DataError, naming the input, where no tensor holds tokens, and for no
    rows.
    """
    tensors = streams.named(inputs)
    sequences = {name: x for name, x in tensors.items() if fits(x.dtype, x.shape)}
    if not sequences:
        raise DataError(f"{', '.join(map(streams.called, tensors))}: no tensor is N×T integers")
    kept = tuple(sorted({int(k) for k in keep}))
    chosen = {n: x for n, x in sequences.items() if not aside(n)}
    found = {}
    for name, x in (chosen or sequences).items():
        if not x.size:
            raise DataError(f"{streams.called(name)} of shape {x.shape} holds no token to measure")
        values, counts = np.unique(x, return_counts=True)
        found[name] = Tokens(values.astype(np.int64), counts, kept)
    return found


def merge(a: Reference, b: Reference) -> dict[str, Tokens]:
    """The reference of the rows of both, exactly."""
    found = {}
    for name, t in a.items():
        values, where = np.unique(np.concatenate([t.values, b[name].values]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([t.counts, b[name].counts]), len(values))
        found[name] = Tokens(values, counts.astype(np.int64), t.kept)
    return found


def fits(dtype: DTypeLike, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be tokens: integers with two axes, the last longer than 1."""
    kind = np.dtype(dtype).kind
    return kind in "iu" and len(shape) == 2 and shape[1] != 1


def aside(name: str) -> bool:
    """Whether a tensor's name says that it goes with tokens and holds none."""
    return any(word in name.lower() for word in ASIDE)


def replaced(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """The share ``REPLACED`` of positions, each by itself, holds another token, drawn as often as
    it occurs in the reference.

    Positions where an input named as a mask, of the same shape, is 0 stay as they are.
    ``reference`` is `measure` of the whole data set (None: of these rows), ``keys`` (N integers)
    name the rows (None: their content does). Returns the same shapes and dtypes. Raises DataError
    for a severity that is none, for tensors unlike the reference's, and where that has no two
    tokens that may stand for each other.
    """
    share = streams.level(REPLACED, severity)
    tensors = streams.named(inputs)
    found = measure(inputs) if reference is None else reference
    rows = streams.keys_of(tensors, keys)
    masks = [x for name, x in tensors.items() if "mask" in name.lower() and name not in found]
    for name, tokens in found.items():
        if name not in tensors or not fits(tensors[name].dtype, tensors[name].shape):
            raise DataError(f"{streams.called(name)} held tokens when it was measured")
        if len(tokens.pool[0]) < 2:
            raise DataError(f"{streams.called(name)} holds no two tokens to take for each other")
        x = tensors[name]
        starts = streams.streams(rows, seed, "replaced", name)
        out = x.copy()
        for part in streams.blocks(x):
            block = x[part]
            u = streams.uniforms(starts[part], 2 * x.shape[1])
            open_ = ~np.isin(block, tokens.kept)
            for mask in masks:
                if mask.shape == x.shape:
                    open_ &= mask[part] != 0
            gone = open_ & (u[:, : x.shape[1]] < share)
            out[part][gone] = _others(block[gone], u[:, x.shape[1] :][gone], tokens)
        tensors[name] = out
    return streams.like(inputs, tensors)


def _others(present: Array, u: F64, tokens: Tokens) -> Array:
    """A token at share ``u`` of those that are not the present one."""
    values, counts = tokens.pool
    upto = np.cumsum(counts)
    at = np.minimum(np.searchsorted(values, present), len(values) - 1)
    own = np.where(values[at] == present, counts[at], 0)
    # Whole numbers, so that no sum rounds into the present token.
    place = np.minimum((u * (upto[-1] - own)).astype(np.int64), upto[-1] - own - 1)
    place += np.where(place >= upto[at] - counts[at], own, 0)
    drawn: I64 = values[np.searchsorted(upto, place, side="right")]
    return drawn
