"""Who may ask for what: keys by role, and nobody from elsewhere while there are no keys."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from types import MappingProxyType

from starlette.routing import BaseRoute
from starlette.types import Scope

from service.addresses import is_local
from service.errors import ServiceError
from service.keys import Key, Keys, Role

OPEN = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no key: whoever runs the server must be able to ask whether it does."""

ROUTE_ROLES: MappingProxyType[str, Role] = MappingProxyType(
    {
        "/v2/models/{name}/infer": "predict",
        "/v2/models/{name}/versions/{version}/infer": "predict",
        "/v1/predict": "predict",
        "/v1/models/{name}/predict": "predict",
        "/v1/models/{name}/example": "predict",
        "/v2": "predict",
        "/v2/models/{name}": "predict",
        "/v2/models/{name}/ready": "predict",
        "/v2/models/{name}/versions/{version}": "predict",
        "/v2/models/{name}/versions/{version}/ready": "predict",
        "/": "predict",
        "/openapi.json": "predict",
        "/docs": "predict",
        "/page.css": "predict",
        "/page.js": "predict",
        "/page/{part}": "predict",
        # BentoML's own.
        "/predict": "predict",
        "/schema.json": "predict",
        "/docs.json": "predict",
        "/v1/labels": "labels",
        "/v1/calibration": "labels",
        "/metrics": "metrics",
        "/v1/predictions/{id}": "admin",
    }
)
"""The role that a route needs, by its template; one that is not here needs "admin"."""

# Basic first: Chromium reads one challenge of a header, and Bearer is none that it can ask for.
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="hedged", Bearer realm="hedged"'}


class Access:
    """Decides on a request before any of its body is read.

    With ``keys``, every path but OPEN needs one of them, and a route of ours its role. Without,
    both ends of the connection must be on this machine, unless the server is ``open``. ``find``
    gives the route of a request.
    """

    def __init__(
        self, find: Callable[[Scope], BaseRoute | None], keys: Keys | None, *, open: bool
    ) -> None:
        self._route = find
        self._keys = keys
        self._open = open

    def check(self, scope: Scope) -> None:
        """Raise ServiceError 401 or 403 unless the request may go on.

        Leaves the route in ``scope["route"]`` where it refuses a known key, and the name of a key
        in ``scope["hedged.caller"]``.
        """
        if scope["path"] in OPEN:
            return
        if self._keys is None:
            if not self._open and not is_local(scope):
                raise ServiceError(
                    403,
                    "keys_needed",
                    "this server answers only its own machine: it has no keys. Set HEDGED_KEYS to "
                    "a file of them (hedged keys add), or HEDGED_OPEN=true to answer anybody",
                )
            return
        key = self._find(scope, self._keys)
        scope["hedged.caller"] = key.name
        route = self._route(scope)
        if route is None:  # no such path or method: the router says so, to those who have a key
            return
        needed = ROUTE_ROLES.get(getattr(route, "path", ""), "admin")
        if not key.may(needed):
            scope["route"] = route
            raise ServiceError(
                403,
                "role_missing",
                f"key {key.name!r} has the role {', '.join(key.roles)}; this needs {needed}",
            )

    def _find(self, scope: Scope, keys: Keys) -> Key:
        headers = dict(scope["headers"])
        scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
        token = headers.get(b"x-api-key")
        match scheme.lower():
            case b"bearer":
                token = rest.strip()
            case b"basic":
                # What browsers can send, for the pages. They send it unasked, from other sites
                # too, and for these a body without a type is the one that they may post.
                if scope["method"] == "POST" and b"content-type" not in headers:
                    raise ServiceError(415, "unsupported_media_type", "send a Content-Type")
                token = _password(rest)
        if token is None:
            raise _unauthorized("send a key: Authorization: Bearer KEY, or X-API-Key: KEY")
        found = keys.find(token)
        if found is None:
            raise _unauthorized("no such key")
        return found


def _password(sent: bytes) -> bytes | None:
    try:
        return base64.b64decode(sent.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return None


def _unauthorized(message: str) -> ServiceError:
    return ServiceError(401, "unauthorized", message, headers=_CHALLENGE)
