"""Where a request comes from and where it arrived: this machine alone, or elsewhere."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def is_local(scope: Mapping[str, Any]) -> bool:
    """Whether a request came from this machine to an address of this machine alone.

    What has no address is a Unix socket, or in the same process.
    """
    server, client = scope.get("server"), scope.get("client")
    if server is not None and server[1] is not None and not is_loopback(server[0]):
        return False  # (path, None) is a Unix socket
    return client is None or is_loopback(client[0])


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone: 127.0.0.0/8, ::1, or "localhost"."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
