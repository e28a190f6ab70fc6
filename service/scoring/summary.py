"""What a run did, and how far it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; what an earlier process did counts as done."""

    fragments_done: int
    fragments: int
    rows_done: int
    rows: int
    bad: int = 0  # rows of committed fragments that have no prediction
    failed: int = 0  # files and fragments that cannot be read


@dataclass(frozen=True, slots=True)
class Failure:
    """A file or fragment that could not be read; ``rows`` None: not even its footer could."""

    source: str
    first_row: int | None
    rows: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished run. ``rows`` are those of every readable file: ``good`` ones have a prediction,
    ``errors`` are in ``_errors/``, the rest stands in ``failed``.

    ``notes`` say what the answers lack; ``lines`` what `service.scoring.measures` found, and
    ``evaluation`` and ``drift`` are its reports, as in their files. ``resumed`` counts fragments
    that an earlier process had committed; ``seconds`` and ``rows_per_s`` are of this process alone.
    """

    run: str
    bundle: str
    rows: int
    good: int
    errors: int
    fragments: int
    failed: tuple[Failure, ...]
    resumed: int
    seconds: float
    rows_per_s: float
    output: str
    notes: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    evaluation: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def lasting(self) -> bytes:
        """``_summary.json``: what does not depend on when, where and in how many goes it ran, and
        is in no file of its own."""
        passing = ("resumed", "seconds", "rows_per_s", "output", "evaluation", "drift")
        kept = {k: v for k, v in self.as_dict().items() if k not in passing}
        return (json.dumps(kept, indent=1) + "\n").encode()
