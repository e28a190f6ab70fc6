"""Connections to PostgreSQL by pg8000, and what their errors say.

pg8000 knows nothing of libpq's files and variables (`service.libpq` does), and is chosen because
psycopg is under the LGPL. What a connection needs is looked up anew each time, so that a renewed
password is used without a restart.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from typing import Any, Literal

import sqlalchemy as sa

from posthoc.contract import HedgedError
from service.libpq import ParameterError, parameters

_SILENT_S = 10  # a server that acknowledges nothing for so long is away


def connect(url: sa.URL, environment: Mapping[str, str]) -> Any:
    """An open connection of pg8000.

    Raises pg8000.InterfaceError for whatever keeps it from being made but the server's own word,
    which is a pg8000.DatabaseError.
    """
    import pg8000

    try:
        found = parameters(url, environment)
    except HedgedError as e:
        raise pg8000.InterfaceError(f"no connection to PostgreSQL: {e}") from e
    try:
        opened = _socket(found)
    except OSError as e:
        at = f"{found['host']}:{found['port']}"
        raise pg8000.InterfaceError(f"no connection to PostgreSQL at {at}: {e}") from e
    try:
        made = pg8000.Connection(
            found["user"],
            host=found["host"],
            database=found["dbname"],
            password=found.get("password"),
            application_name=found["application_name"],
            startup_params={"options": found["options"]} if "options" in found else None,
            ssl_context=_context(found),
            sock=opened,
        )
    except BaseException as e:
        opened.close()  # pg8000 leaves it open where the encryption fails
        raise _reason(e, found) from e
    made._usock.settimeout(None)  # it bounded the connection; a statement may take longer
    return made


def _reason(error: BaseException, found: Mapping[str, str]) -> BaseException:
    """What to say of a connection that failed half way."""
    import pg8000
    import scramp  # which pg8000 asks for

    earlier: BaseException | None = error
    while earlier is not None:
        if _told(earlier) is not None:
            return earlier  # the server's own word; pg8000 closes then, and may fail in that, too
        earlier = earlier.__context__
    told = error
    if isinstance(error, AttributeError) and "password" not in found:
        told = ParameterError("the server asks for a password, and there is none")
    # ValueError: what is no certificate.
    if isinstance(told, HedgedError | OSError | ValueError | scramp.ScramException):
        told = pg8000.InterfaceError(f"no connection to PostgreSQL: {told}")
    return told


def error_code(error: BaseException | None) -> str | None:
    """The SQLSTATE of an error of PostgreSQL, None where it was not the server that spoke."""
    return None if (told := _told(error)) is None else told.get("C")


def error_text(error: BaseException | None) -> str | None:
    """What PostgreSQL says of an error, None where it was not the server that spoke."""
    return None if (told := _told(error)) is None else told.get("M")


def _told(error: BaseException | None) -> dict[str, str] | None:
    told = error.args[0] if error is not None and error.args else None
    return told if isinstance(told, dict) else None


def _socket(found: Mapping[str, str]) -> socket.socket:
    timeout, port = float(found["connect_timeout"]), int(found["port"])
    if found["host"].startswith("/"):
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        local.settimeout(timeout)
        try:
            local.connect(f"{found['host']}/.s.PGSQL.{port}")
        except OSError:
            local.close()
            raise
        return local
    far = socket.create_connection((found["host"], port), timeout)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _SILENT_S), ("TCP_USER_TIMEOUT", _SILENT_S * 1000)):
        if hasattr(socket, name):  # as Linux has
            far.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return far


def _context(found: Mapping[str, str]) -> ssl.SSLContext | Literal[False] | None:
    """How to encrypt; False: not at all, None: where the server can. Like libpq, with a root
    certificate `require` checks who signed the server's."""
    mode, root = found["sslmode"], found.get("sslrootcert")
    if mode == "disable" or found["host"].startswith("/"):
        return False
    if mode == "prefer":
        return None
    context = ssl.create_default_context(cafile=None if root == "system" else root)
    context.check_hostname = mode == "verify-full"
    if mode == "require" and root is None:
        context.verify_mode = ssl.CERT_NONE
    if "sslcert" in found:
        context.load_cert_chain(found["sslcert"], found.get("sslkey"))
    return context
