"""What a format of input files is: how rows are counted, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from posthoc.contract import TensorSpec
from service.scoring.places import Place


@dataclass(frozen=True, slots=True)
class Layout:
    """What a look at a file says: rows of each group that can be read by itself, in order, and the
    columns as they are read."""

    groups: tuple[int, ...]
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be read of a file: row groups, and columns in this order.

    ``rows`` says how many rows a piece may have, given the mean number of values that a row has in
    the columns that are ``inputs`` of the model, or None where that is not known beforehand.
    ``inputs`` maps such a column to the input that it fills: text becomes a number of its dtype.
    """

    groups: Sequence[int]
    columns: Sequence[str]
    inputs: Mapping[str, TensorSpec]
    rows: Callable[[float | None], int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows; those in ``bad`` could not be read, for that reason, and hold nulls."""

    batch: pa.RecordBatch
    bad: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """A format of files whose names have one of ``endings``.

    ``look`` and ``read`` raise OSError or an Arrow error for a file that is damaged; ``read`` gives
    every row of the wanted groups, the bad ones too.
    """

    name: str
    endings: tuple[str, ...]
    look: Callable[[Place], Layout]
    read: Callable[[Place, Wanted], Iterator[Piece]]

    def stem(self, name: str) -> str | None:
        """The name of a file without its ending; None for a file of another format."""
        lower = name.lower()
        found = [e for e in self.endings if lower.endswith(e)]
        return name[: -len(max(found, key=len))] if found else None
