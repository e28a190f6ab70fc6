"""Media types: what a request is, and what its answer shall be."""

from __future__ import annotations

from collections.abc import Sequence

JSON = "application/json"
BINARY = "application/octet-stream"  # JSON, then tensors
NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"


def media_type(header: str) -> str:
    """The type in a Content-Type, without its parameters."""
    return header.split(";", 1)[0].strip().lower()


def preferred(accept: Sequence[str], offered: Sequence[str], default: str) -> str:
    """The one of ``offered`` that the ``Accept`` headers want most; ``default`` where they name
    none of them, or several as much."""
    wanted = dict.fromkeys(offered, 0.0)
    for part in ",".join(accept).split(","):
        name = media_type(part)
        if name in wanted:
            wanted[name] = _weight(part)
    best = max(wanted.values())
    liked = [name for name, weight in wanted.items() if weight == best > 0]
    return liked[0] if len(liked) == 1 else default


def _weight(part: str) -> float:
    for parameter in part.split(";")[1:]:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
