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
from service.scoring.images import Images

BLOCK_ROWS = 16_384
BLOCK_BYTES = 32 << 20
_STREAM_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reader:
    """What a fragment is read as: the model's inputs, and columns ``kept`` as they are.

    With ``images`` blocks are bounded by the bytes of images and of their maps.
    """

    mapping: TableMapping
    inputs: tuple[TensorSpec, ...]
    kept: tuple[str, ...]
    batch_size: int
    images: Images | None = None
    group: str | None = None  # the column of groups, where the bundle has thresholds for them
    randomised: bool = False  # hash each row's content, which is its u


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a source from ``first_row`` on: kept columns, and inputs to the model in
    ``parts`` whose rows have one shape: images of free size are a part each."""

    first_row: int
    kept: pa.RecordBatch
    parts: tuple[Rows, ...]


def block_rows(batch_size: int, inputs: Sequence[TensorSpec]) -> int:
    """Rows of a block: whole batches, within BLOCK_ROWS and BLOCK_BYTES, at least one batch."""
    if any(-1 in s.shape[1:] for s in inputs):
        return batch_size  # a free axis takes its size from the rows that are read together
    row_bytes = sum(prod(s.shape[1:]) * np.dtype(s.dtype).itemsize for s in inputs)
    limit = min(BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes))
    return batch_size * max(1, limit // batch_size)


def image_rows(file: pq.ParquetFile, fragment: Fragment, reader: Reader, images: Images) -> int:
    """Images of a block. Where their size is free it is taken to be the fragment's mean, which the
    file's footer has exactly."""
    values: float = images.values
    if images.free:
        needed = {c for columns in reader.mapping.inputs.values() for c in columns}
        groups = [file.metadata.row_group(g) for g in fragment.groups]
        chunks = (group.column(i) for group in groups for i in range(group.num_columns))
        held = (c.num_values for c in chunks if c.path_in_schema.split(".")[0] in needed)
        values = sum(held) / max(1, fragment.rows)
    return images.in_block(values, reader.batch_size)


def read_blocks(fragment: Fragment, reader: Reader) -> Iterator[Block]:
    """The fragment's blocks in order.

    Raises DamageError when its bytes cannot be decoded, and DataError when a column cannot
    be an input of the model.
    """
    mapping = TableMapping(inputs=reader.mapping.inputs, group=reader.group)
    at = 0
    for batch in _record_batches(fragment, reader):
        cut = [batch]
        if reader.images is not None and reader.images.free:
            cut = [batch.slice(row, 1) for row in range(batch.num_rows)]
        parts = tuple(
            to_rows(part, mapping, reader.inputs, hashed=reader.randomised) for part in cut
        )
        yield Block(fragment.first_row + at, batch.select(list(reader.kept)), parts)
        at += batch.num_rows
    if at != fragment.rows:
        raise DamageError(f"{at} rows could be read where the footer says {fragment.rows}")


def _record_batches(fragment: Fragment, reader: Reader) -> Iterator[pa.RecordBatch]:
    needed = (c for columns in reader.mapping.inputs.values() for c in columns)
    group = () if reader.group is None else (reader.group,)
    columns = list(dict.fromkeys((*needed, *group, *reader.kept)))
    try:
        # Unbuffered and pre-buffered reading both hold whole row groups in memory.
        with pq.ParquetFile(
            fragment.source.path,
            buffer_size=_STREAM_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file:
            size = (
                block_rows(reader.batch_size, reader.inputs)
                if reader.images is None
                else image_rows(file, fragment, reader, reader.images)
            )
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
