"""A fragment's rows, in blocks of several batches, read ahead by one block.

Blocks bound the memory and spread the cost of decoding; what the model sees are batches, cut from
the fragment's first row on, so a block's size never shows in an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
import pyarrow as pa

from posthoc.columns import merge
from posthoc.contract import TensorSpec
from posthoc.data import Rows, TableMapping, to_rows
from service.scoring.errors import DamageError, ScoringError, first_line
from service.scoring.formats.format import Piece, Pixels, Wanted
from service.scoring.formats.numbers import from_texts
from service.scoring.formats.registry import FORMATS
from service.scoring.fragments import Fragment
from service.scoring.images import Images

BLOCK_ROWS = 16_384
BLOCK_BYTES = 32 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reader:
    """What a fragment is read as: the model's inputs, and columns ``kept`` and ``beside`` as they
    are.

    With ``images`` blocks are bounded by the bytes of images and of their maps.
    """

    mapping: TableMapping
    inputs: tuple[TensorSpec, ...]
    kept: tuple[str, ...]
    batch_size: int
    images: Images | None = None
    group: str | None = None  # the column of groups, where the bundle has thresholds for them
    randomised: bool = False  # each row's u is a hash of its content
    beside: tuple[str, ...] = ()  # what rows are measured by: labels, split keys
    pixels: Pixels = Pixels()

    @property
    def hashed(self) -> bool:
        """Whether a row's content is hashed."""
        return self.randomised or bool(self.beside)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a source from ``first_row`` on: kept columns and those beside, and inputs
    to the model in ``parts`` whose rows have one shape: images of free size are a part each."""

    first_row: int
    kept: pa.RecordBatch
    beside: pa.RecordBatch
    parts: tuple[Rows, ...]


def block_rows(batch_size: int, inputs: Sequence[TensorSpec]) -> int:
    """Rows of a block: whole batches, within BLOCK_ROWS and BLOCK_BYTES, at least one batch."""
    if any(-1 in s.shape[1:] for s in inputs):
        return batch_size  # a free axis takes its size from the rows that are read together
    row_bytes = sum(prod(s.shape[1:]) * np.dtype(s.dtype).itemsize for s in inputs)
    limit = min(BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes))
    return batch_size * max(1, limit // batch_size)


def _rows_of(reader: Reader, values: float | None) -> int:
    """Rows of a block. Images of free size are taken to be as large as their fragment's mean."""
    if reader.images is None:
        return block_rows(reader.batch_size, reader.inputs)
    typical = reader.images.values
    size = values if values is not None and reader.images.free else typical
    return reader.images.in_block(size, reader.batch_size)


def read_blocks(fragment: Fragment, reader: Reader) -> Iterator[Block]:
    """The fragment's blocks in order.

    Raises DamageError when its bytes cannot be decoded, and DataError when a column cannot
    be an input of the model.
    """
    mapping = TableMapping(inputs=reader.mapping.inputs, group=reader.group)
    at = 0
    for piece in _pieces(fragment, reader):
        batch = piece.batch
        cut = [(0, batch.num_rows)]
        if reader.images is not None and reader.images.free:
            cut = [(row, 1) for row in range(batch.num_rows)]
        parts = []
        for start, count in cut:
            bad = {r - start: why for r, why in piece.bad.items() if start <= r < start + count}
            rows = to_rows(batch.slice(start, count), mapping, reader.inputs, hashed=reader.hashed)
            parts.append(replace(rows, bad={**rows.bad, **bad}))
        kept, beside = (batch.select(list(names)) for names in (reader.kept, reader.beside))
        yield Block(fragment.first_row + at, kept, beside, tuple(parts))
        at += batch.num_rows
    if at != fragment.rows:
        raise DamageError(f"{at} rows could be read where {fragment.rows} were counted")


def check_damaged(fragment: Fragment, reader: Reader) -> None:
    """Raise ScoringError when a fragment of an object store, whose bytes could not be decoded, can
    be decoded now: it was the store that failed. Raises DamageError when they cannot."""
    if fragment.source.place.local is None:
        for _ in read_blocks(fragment, reader):
            pass
        raise ScoringError(
            f"input {fragment.source.place} could not be fetched for a moment; run the same "
            "command again to go on"
        )


def _pieces(fragment: Fragment, reader: Reader) -> Iterator[Piece]:
    source = fragment.source
    specs = {s.name: s for s in reader.inputs}
    inputs = {c: specs[name] for name, cs in reader.mapping.inputs.items() for c in cs}
    group = () if reader.group is None else (reader.group,)
    columns = dict.fromkeys((*inputs, *group, *reader.kept, *reader.beside))
    keys = {k: v for k, v in source.keys if k in columns}
    wanted = Wanted(
        groups=fragment.groups,
        columns=tuple(c for c in columns if c not in keys),
        inputs={c: spec for c, spec in inputs.items() if c not in keys},
        rows=partial(_rows_of, reader),
        count=fragment.rows,
        start=source.starts[fragment.groups[0]] if source.starts and fragment.groups else 0,
        files=source.files,
        pixels=reader.pixels,
    )
    try:
        for piece in FORMATS[source.format].read(source.place, wanted):
            yield _with_keys(piece, keys, inputs) if keys else piece
    except (OSError, pa.ArrowException) as e:
        raise DamageError(first_line(e)) from e


def _with_keys(
    piece: Piece, keys: Mapping[str, str | None], inputs: Mapping[str, TensorSpec]
) -> Piece:
    """Columns that are only part of the path: one value throughout."""
    batch, bad = piece.batch, dict(piece.bad)
    for name, value in keys.items():
        column = pa.array([value] * batch.num_rows, pa.string())
        if name in inputs:
            column, faults = from_texts(column, inputs[name])
            merge(bad, name, faults)
        batch = batch.append_column(name, column)
    return Piece(batch, bad)


def read_ahead(pool: Executor, items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one being made in ``pool`` from now on; it starts before its use.

    The pool must have one thread, since an iterator is used by one at a time.
    """
    end = object()
    pending = pool.submit(next, items, end)

    def rest() -> Iterator[T]:
        nonlocal pending
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item  # type: ignore[misc]  # the sentinel ended the loop

    return rest()
