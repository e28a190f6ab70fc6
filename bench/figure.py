"""One figure that README and docs quote: a sentence made of what a benchmark found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the page: the benchmark, what is measured, and how its value reads."""

    bench: str
    what: str
    value: Callable[[Found], str]
