"""What a format of input files is: how rows are counted, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from posthoc.contract import HedgedError, TensorSpec
from service.scoring.errors import first_line
from service.scoring.places import Found, Place

Filling = Mapping[str, tuple[str, ...]]  # input of the model -> the columns that fill it


@dataclass(frozen=True, slots=True)
class Layout:
    """What a look at a file says: rows of each group that can be read by itself, in order, and the
    columns as they are read.

    ``starts`` are the byte offsets of the groups, where a reader needs them.
    """

    groups: tuple[int, ...]
    schema: pa.Schema
    starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pixels:
    """What becomes of the bytes of an image before a float input takes them: (pixel / ``scale`` -
    ``mean``) / ``std``, each of the last two one number or one for each channel.

    ``resize`` (height, width) fits every image to one size. None and () say that nobody said so.
    """

    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be read of a file: consecutive groups, and columns in this order.

    ``rows`` says how many rows a piece may have, given the mean number of values that a row has in
    the columns that are ``inputs`` of the model, or None where that is not known beforehand.
    ``inputs`` maps such a column to the input that it fills: text becomes a number of its dtype.
    ``count`` is how many rows the groups have, and ``start`` where the first of them begins, if the
    layout said so. Where each file is a row, ``files`` are those of the groups, and ``pixels`` says
    how they are read.
    """

    groups: Sequence[int]
    columns: Sequence[str]
    inputs: Mapping[str, TensorSpec]
    rows: Callable[[float | None], int]
    count: int
    start: int = 0
    files: Sequence[Found] = ()
    pixels: Pixels = Pixels()


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows; those in ``bad`` could not be read, for that reason, and hold nulls."""

    batch: pa.RecordBatch
    bad: Mapping[int, str] = field(default_factory=dict)


def as_fitted(filling: Filling, specs: Sequence[TensorSpec], schema: pa.Schema) -> Filling:
    """The columns that the bundle was fitted with."""
    return filling


@dataclass(frozen=True, slots=True)
class Format:
    """A format of files whose names have one of ``endings``.

    ``look`` and ``read`` raise OSError or an Arrow error for a file that is damaged; ``read`` gives
    every row of the wanted groups, the bad ones too. ``fill`` says which columns fill the model's
    inputs, given those that it was fitted with. With ``files_are_rows`` the rows are whole files,
    in the order of their names, and ``look`` is never asked for one. The columns ``keys`` are
    copied to every output.
    """

    name: str
    endings: tuple[str, ...]
    look: Callable[[Place], Layout]
    read: Callable[[Place, Wanted], Iterator[Piece]]
    fill: Callable[[Filling, Sequence[TensorSpec], pa.Schema], Filling] = as_fitted
    files_are_rows: bool = False
    keys: tuple[str, ...] = ()

    def stem(self, name: str) -> str | None:
        """The name of a file without its ending; None for a file of another format."""
        lower = name.lower()
        found = [e for e in self.endings if lower.endswith(e)]
        return name[: -len(max(found, key=len))] if found else None


@contextmanager
def damage() -> Iterator[None]:
    """Turns what other readers raise on damaged bytes into an OSError."""
    try:
        yield
    except (OSError, pa.ArrowException):
        raise
    except HedgedError as e:
        raise OSError(str(e)) from e
    except Exception as e:  # zip, deflate and NumPy's readers raise a dozen unrelated types
        raise OSError(f"damaged or cut off? {first_line(e)}") from e
