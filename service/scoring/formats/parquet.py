"""Parquet: a group is a row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from service.scoring.formats.format import Format, Layout, Piece, Wanted
from service.scoring.places import Place

_STREAM_BYTES = 1 << 20


def look(place: Place) -> Layout:
    """Row groups and schema, from the footer."""
    with place.open() as file, pq.ParquetFile(file) as table:
        meta = table.metadata
        groups = tuple(meta.row_group(g).num_rows for g in range(meta.num_row_groups))
        return Layout(groups, table.schema_arrow)


def read(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time; no row group is ever held whole."""
    # Unbuffered and pre-buffered reading both hold whole row groups in memory.
    with (
        place.open() as file,
        pq.ParquetFile(
            file,
            buffer_size=_STREAM_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as table,
    ):
        size = wanted.rows(_values(table.metadata, wanted))
        columns = list(wanted.columns)
        for batch in table.iter_batches(
            size, row_groups=list(wanted.groups), columns=columns, use_threads=False
        ):
            yield Piece(batch.select(columns))


def _values(meta: pq.FileMetaData, wanted: Wanted) -> float:
    """Mean number of values that a row has in the columns of inputs: exact, from the footer."""
    groups = [meta.row_group(g) for g in wanted.groups]
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    held = (c.num_values for c in chunks if c.path_in_schema.split(".")[0] in wanted.inputs)
    return float(sum(held) / max(1, sum(group.num_rows for group in groups)))


PARQUET = Format("Parquet", (".parquet", ".pq"), look, read)
