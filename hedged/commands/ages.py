"""Ages as people write them."""

from __future__ import annotations

import re

import typer

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def seconds(text: str, option: str) -> float:
    """Seconds of an age such as 90d, 36h or 2w. BadParameter names the ``option`` otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if found is None:
        raise typer.BadParameter(f"{option} takes an age such as 90d or 36h, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]
