"""A fragment's rows, in blocks of several batches, read ahead by one block.

Blocks bound the memory and spread the cost of decoding; what the model sees are batches, cut from
the fragment's first row on, so a block's size never shows in an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posthoc.contract import TensorSpec
from posthoc.data import Rows, TableMapping, to_rows
from service.scoring.errors import DamageError
from service.scoring.fragments import Fragment, first_line

BLOCK_ROWS = 16_384
BLOCK_BYTES = 32 << 20
_STREAM_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reader:
    """What a fragment is read as: the model's inputs, and columns ``kept`` as they are."""

    mapping: TableMapping
    inputs: tuple[TensorSpec, ...]
    kept: tuple[str, ...]
    batch_size: int


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a source from ``first_row`` on: kept columns, and inputs to the model."""

    first_row: int
    kept: pa.RecordBatch
    rows: Rows


def block_rows(batch_size: int, inputs: Sequence[TensorSpec]) -> int:
    """Rows of a block: whole batches, within BLOCK_ROWS and BLOCK_BYTES, at least one batch."""
    if any(-1 in s.shape[1:] for s in inputs):
        return batch_size  # a free axis takes its size from the rows that are read together
    row_bytes = sum(prod(s.shape[1:]) * np.dtype(s.dtype).itemsize for s in inputs)
    limit = min(BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes))
    return batch_size * max(1, limit // batch_size)


def read_blocks(fragment: Fragment, reader: Reader) -> Iterator[Block]:
    """The fragment's blocks in order.

    Raises DamageError when its bytes cannot be decoded, and DataError when a column cannot
    be an input of the model.
    """
    mapping = TableMapping(inputs=reader.mapping.inputs)  # no target, group or split is read
    at = 0
    for batch in _record_batches(fragment, reader):
        rows = to_rows(batch, mapping, reader.inputs, hashed=False)
        yield Block(fragment.first_row + at, batch.select(list(reader.kept)), rows)
        at += batch.num_rows
    if at != fragment.rows:
        raise DamageError(f"{at} rows could be read where the footer says {fragment.rows}")


def _record_batches(fragment: Fragment, reader: Reader) -> Iterator[pa.RecordBatch]:
    size = block_rows(reader.batch_size, reader.inputs)
    needed = (c for columns in reader.mapping.inputs.values() for c in columns)
    columns = list(dict.fromkeys((*needed, *reader.kept)))
    try:
        # Unbuffered and pre-buffered reading both hold whole row groups in memory.
        with pq.ParquetFile(
            fragment.source.path,
            buffer_size=_STREAM_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file:
            yield from file.iter_batches(
                size, row_groups=fragment.groups, columns=columns, use_threads=False
            )
    except (OSError, pa.ArrowException) as e:
        raise DamageError(first_line(e)) from e


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
