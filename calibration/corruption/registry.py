"""Every corruption by kind of input and name, and one call for them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calibration.corruption import images, streams, tables, tokens
from calibration.corruption.streams import Inputs
from posthoc.contract import Array, DataError, TensorSpec

Kind = Literal["images", "tables", "tokens"]


@dataclass(frozen=True, slots=True)
class Corruption:
    """``apply(inputs, severity, reference=…, keys=…, seed=…)``, and what it does, in a line."""

    apply: Callable[..., Inputs]
    summary: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What a corruption needs to know of a whole data set, by tensor."""

    kind: Kind
    reference: Mapping[str, Any]


CORRUPTIONS: dict[Kind, dict[str, Corruption]] = {
    "images": {
        "noise": Corruption(images.noise, "Gaussian noise on every pixel"),
        "blur": Corruption(images.blur, "out of focus: a Gaussian filter"),
        "occlusion": Corruption(images.occlusion, "a square somewhere, filled with grey"),
        "contrast": Corruption(images.contrast, "every pixel nearer to the mean of its image"),
    },
    "tables": {
        "missing": Corruption(tables.missing, "cells set to the median of their column, or to NaN"),
        "noise": Corruption(tables.noise, "Gaussian noise on every cell"),
        "scaled": Corruption(tables.scaled, "one column of a row in another unit"),
        "shuffled": Corruption(tables.shuffled, "cells taken from other rows"),
    },
    "tokens": {
        "tokens": Corruption(tokens.replaced, "positions that hold other tokens of the data"),
    },
}
_PAGES: dict[Kind, Any] = {"images": images, "tokens": tokens, "tables": tables}


def kind_of(inputs: Mapping[str, Array] | Mapping[str, TensorSpec] | Array) -> Kind:
    """Images, a table or tokens, by dtype and number of axes alone.

    Numbers with three or four axes are images; integers N×T are tokens; other numbers with one or
    two axes are a table. Booleans count for nothing, nor do masks and the like beside tokens. An
    array, arrays by name, or the specs of a model's inputs. Raises DataError, naming the inputs,
    where none fits, and where they are of several kinds.
    """
    found: dict[str, Kind] = {}
    given = inputs if isinstance(inputs, Mapping) else {"": np.asarray(inputs)}
    for name, x in given.items():
        for kind, page in _PAGES.items():
            if page.fits(x.dtype, tuple(x.shape)):
                found.setdefault(name, kind)
    if not found:
        shapes = [f"{streams.called(n)} ({x.dtype}, {len(x.shape)} axes)" for n, x in given.items()]
        raise DataError(
            f"no corruption fits {', '.join(shapes)}: images have three or four axes, tables one "
            "or two, tokens are integers N×T"
        )
    if "tokens" in found.values():
        bare = {n: k for n, k in found.items() if not tokens.aside(n)}
        found = bare or found
    if len(set(found.values())) > 1:
        each = ", ".join(f"{streams.called(n)} ({k})" for n, k in found.items())
        raise DataError(f"inputs are of several kinds: {each}; say which kind to corrupt")
    return next(iter(found.values()))


def measure(inputs: Inputs, kind: Kind | None = None, **options: Any) -> Measured:
    """What corruptions of the ``kind`` (None: `kind_of`) need to know of a data set; ``options``
    are those of the page's own ``measure``. Tensors of other kinds are left as they are."""
    chosen = kind_of(inputs) if kind is None else kind
    return Measured(chosen, _page(chosen).measure(inputs, **options))


def merge(a: Measured, b: Measured) -> Measured:
    """What is known of the rows of both: equal to `measure` of all of them at once."""
    return Measured(a.kind, _page(a.kind).merge(a.reference, b.reference))


def corrupt(
    inputs: Inputs,
    name: str,
    severity: int,
    measured: Measured,
    *,
    keys: Array | None = None,
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """N rows with one corruption at ``severity`` 1 to 5, in the form and dtypes of ``inputs``.

    A row's answer depends on the row, ``keys`` (N integers such as its index; None: a hash of its
    content), ``seed`` and ``measured`` alone. ``options`` are those of the corruption. Raises
    DataError for an unknown name, and as the corruptions do.
    """
    known = CORRUPTIONS[measured.kind]
    if name not in known:
        raise DataError(
            f"no corruption of {measured.kind} is called {name!r}; there are {', '.join(known)}"
        )
    return known[name].apply(
        inputs, severity, reference=measured.reference, keys=keys, seed=seed, **options
    )


def _page(kind: Kind) -> Any:
    if kind not in _PAGES:
        raise DataError(f"no kind of inputs is called {kind!r}; there are {', '.join(_PAGES)}")
    return _PAGES[kind]
