"""A labelled set spoilt on purpose: the corruptions asked for, and the rows they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from calibration.corruption import CORRUPTIONS, Measured, corrupt, kind_of, measure, merge
from calibration.corruption.streams import SEVERITIES
from posthoc.contract import Array, DataError, TensorSpec

ALL = "all"
DEFAULT = (1, 3, 5)
_MEASURED = 20_000  # rows, about, that a corruption learns the columns from


class Corrupted(NamedTuple):
    """One corruption at one severity; ``name`` is that of the set it makes."""

    corruption: str
    severity: int

    @property
    def name(self) -> str:
        """Of the set."""
        return f"{self.corruption} {self.severity}"


def asked_for(
    specs: Sequence[TensorSpec], names: Sequence[str], severities: Sequence[int]
) -> tuple[Corrupted, ...]:
    """Every corruption named (``all``: every one that fits the model's inputs) at each severity.

    Raises DataError, naming what there is, for inputs that no corruption fits, an unknown name and
    a severity that is none.
    """
    known = CORRUPTIONS[kind_of({s.name: s for s in specs})]
    chosen = list(known) if list(names) == [ALL] else list(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            raise DataError(
                f"no corruption of this model's inputs is called {name!r}; there are "
                f"{', '.join(known)}, or {ALL}"
            )
    levels = sorted(set(severities))
    for level in levels:
        if level not in SEVERITIES:
            raise DataError(f"severity {level} is none of 1, 2, 3, 4 and 5")
    if not chosen or not levels:
        raise DataError("name a corruption and a severity, or neither")
    return tuple(Corrupted(name, level) for name in chosen for level in levels)


class Knowing:
    """What corruptions need to know of a set of about ``n_rows``, learnt batch by batch.

    Of a large table a part of the rows tells enough; their hashes choose it, whatever the order.
    """

    def __init__(self, n_rows: int):
        self.share = min(1.0, _MEASURED / max(1, n_rows))
        self.held: list[tuple[int, Measured]] = []
        self.spare: Mapping[str, Array] | None = None

    def add(self, inputs: Mapping[str, Array], hashes: Array) -> None:
        """N rows and their content hashes."""
        keep = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.share
        if not keep.any():
            self.spare = inputs
            return
        part, size = measure({k: v[keep] for k, v in inputs.items()}), 1
        # Equal numbers of batches are joined first, so that a row is moved log n times.
        while self.held and self.held[-1][0] == size:
            part, size = merge(self.held.pop()[1], part), 2 * size
        self.held.append((size, part))

    def known(self) -> Measured:
        """All of it. Raises DataError where there was no row."""
        if not self.held and self.spare is not None:
            return measure(self.spare)
        if not self.held:
            raise DataError("no row is left to be corrupted")
        found = self.held[-1][1]
        for _, part in reversed(self.held[:-1]):
            found = merge(part, found)
        return found


class Spoiler:
    """Inputs and their content hashes → spoilt inputs, in any batch the same."""

    def __init__(self, what: Corrupted, known: Measured, seed: int):
        self.what, self.known, self.seed = what, known, seed

    def __call__(self, inputs: Mapping[str, Array], hashes: Array) -> Mapping[str, Array]:
        found = corrupt(
            inputs,
            self.what.corruption,
            self.what.severity,
            self.known,
            keys=hashes,
            seed=self.seed,
        )
        assert isinstance(found, Mapping)
        return found
