"""Logs as JSON lines on stderr: what the service says, and requests that failed or were slow.

No line holds a body, a row's id or a key.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

Which = Literal["errors", "all", "none"]
_FACTS = "hedged_facts"  # the attribute of a record that holds further fields
_requests = logging.getLogger("hedged.requests")


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC), level, logger, message, further fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FACTS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # What is no UTF-8 in a path or a message must not cost the line.
        return orjson.dumps(_plain(line), default=str).decode()


def setup() -> None:
    """Send what the ``hedged`` loggers say to stderr as JSON, and nowhere else.

    For a process that is ours alone; where the application is part of another one, logging is that
    one's to set up. Twice is once.
    """
    logger = logging.getLogger("hedged")
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # BentoML gives the root a handler of its own


class RequestLog:
    """Which requests are logged: those that failed or took ``slow`` seconds, all, or none."""

    def __init__(self, which: Which, slow: float) -> None:
        self.which = which
        self.slow = slow

    def wants(self, status: int, seconds: float) -> bool:
        """Whether a request that ended so has a line."""
        if self.which == "errors":
            return status >= 400 or seconds >= self.slow
        return self.which == "all"

    def write(self, status: int, seconds: float, **facts: Any) -> None:
        """One line about a request; facts that are None are left out."""
        level = logging.ERROR if status >= 500 else logging.INFO
        known = {name: value for name, value in facts.items() if value is not None}
        line = {"status": status, "ms": round(seconds * 1000, 3), **known}
        _requests.log(level, "request", extra={_FACTS: line})


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if type(value) is str else value
        for name, value in line.items()
    }
