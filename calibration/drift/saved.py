"""A detector's state as one JSON object, read back strictly."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from posthoc.contract import DataError

VERSION = 1


class Saved(BaseModel):
    """What is written; the subclass of a detector names its fields. Floats are finite, and JSON's
    shortest decimals bring each of them back bit by bit."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    detector: str
    version: int = VERSION


S = TypeVar("S", bound=Saved)


def text_of(saved: Saved) -> str:
    """One line of JSON."""
    plain: dict[str, Any] = saved.model_dump()
    return json.dumps(plain, allow_nan=False, separators=(",", ":"))


def read(kind: type[S], detector: str, text: str) -> S:
    """The inverse. Raises DataError for what is no such object, or is another detector's or a
    newer one."""
    try:
        saved = kind.model_validate_json(text)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the text"
        raise damaged(detector, f"{place}: {first['msg']}") from None
    if (saved.detector, saved.version) != (detector, VERSION):
        raise damaged(detector, f"it is of {saved.detector!r}, version {saved.version}")
    return saved


def damaged(detector: str, what: str) -> DataError:
    """The error for a text that holds no state."""
    return DataError(
        f"this is no saved state of the drift detector {detector!r}, version {VERSION} ({what}): "
        "start the detector anew from its reference"
    )
