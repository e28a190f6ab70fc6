"""Names of requests and of rows."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Sequence

from service.errors import ServiceError, invalid, shorten

ID_LENGTH = 128
_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{ID_LENGTH}}}")


# Ids must differ, not be secret; asking the system for each would be a call of the kernel.
_random = random.Random()  # seeded by the system
os.register_at_fork(after_in_child=_random.seed)


def new_id() -> str:
    """A new id: 48 bits of milliseconds, then 80 random bits, in hex; later ids sort later."""
    return f"{time.time_ns() // 1_000_000 << 80 | _random.getrandbits(80):032x}"


def valid_id(text: str) -> bool:
    """Whether a text may be the id of a row or a request: [A-Za-z0-9._:-]{1,128}."""
    return _ID.fullmatch(text) is not None


def row_ids(rows: int, base: str | None, ids: Sequence[str] | None) -> tuple[str, list[str]]:
    """The request's id (a new one when ``base`` is None) and one id per row.

    Rows are called ``ids``, or ``{base}:{row}``. Raises ServiceError 400 for an invalid id, for a
    number of ids that is not the number of rows, and for an id that is given twice.
    """
    if base is None:
        base = new_id()
    elif not valid_id(base):
        raise _bad(base)
    if ids is None:
        named = [f"{base}:{row}" for row in range(rows)]
        if len(named[-1]) > ID_LENGTH:
            raise _bad(named[-1])
        return base, named
    if len(ids) != rows:
        raise invalid(f"{len(ids)} ids were given for {rows} rows")
    seen: set[str] = set()
    for given in ids:
        if not valid_id(given):
            raise _bad(given)
        if given in seen:
            raise invalid(f"id {given!r} is given to more than one row")
        seen.add(given)
    return base, list(ids)


def _bad(text: str) -> ServiceError:
    return invalid(
        f"id {shorten(text)!r} is not 1 to {ID_LENGTH} of the characters A-Z a-z 0-9 . _ : -"
    )
