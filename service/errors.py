"""What a request can fail with, and the two shapes in which a failure leaves the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from posthoc.contract import HedgedError


class ServiceError(HedgedError):
    """A request that cannot be answered: HTTP status, a stable code, a message for its sender,
    and response headers that belong to the failure."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


def invalid(message: str) -> ServiceError:
    """400: the request itself is wrong; the message names the part and the fix."""
    return ServiceError(400, "invalid_request", message)


def unknown_model(name: str, known: Mapping[str, Any]) -> ServiceError:
    """404: no such model here."""
    served = ", ".join(sorted(known)) or "none"
    return ServiceError(404, "unknown_model", f"no model {shorten(name)!r} is served ({served})")


def unavailable_model(name: str, why: str, seconds: float) -> ServiceError:
    """503: a model that is there and cannot be served, ``why``; looked at again in ``seconds``."""
    message = f"model {name!r} cannot be served: {why}"
    after = {"Retry-After": str(math.ceil(seconds))}
    return ServiceError(503, "model_unavailable", message, headers=after)


def overloaded(reason: str, code: str = "overloaded") -> ServiceError:
    """503 with Retry-After: the server is full or not ready, the request may be sent again."""
    return ServiceError(503, code, reason, headers={"Retry-After": "1"})


def is_oip(path: str) -> bool:
    """Whether a path belongs to the Open Inference Protocol, which has its own error object."""
    return path == "/v2" or path.startswith("/v2/")


def error_body(path: str, code: str, message: str, request_id: str) -> bytes:
    """The error object as JSON: ``{"error": message}`` on OIP paths, the canonical one elsewhere.

    Source of the first: Open Inference Protocol, inference_rest.md, "Inference Response Error".
    """
    if is_oip(path):
        return orjson.dumps({"error": message})
    return orjson.dumps({"error": {"code": code, "message": message, "request_id": request_id}})


def shorten(text: str, limit: int = 100) -> str:
    """Text from a request, cut so that an answer does not echo megabytes."""
    return text if len(text) <= limit else text[:limit] + "…"
