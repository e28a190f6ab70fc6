"""What a connection to PostgreSQL needs, found as users of libpq expect: in a URL, a service file,
the PG* variables, a password file."""

from __future__ import annotations

import configparser
import getpass
import re
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy as sa

from posthoc.contract import HedgedError

# Keyword of a connection: the variable that stands for it.
VARIABLES = {
    "host": "PGHOST",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "application_name": "PGAPPNAME",
    "options": "PGOPTIONS",
}
_DEFAULTS = {
    "port": "5432",
    "passfile": "~/.pgpass",
    "sslmode": "prefer",
    "connect_timeout": "5",
    "application_name": "hedged",
}
_SSL_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")
_FIELD = re.compile(r"((?:\\.|[^\\:])*)(?::|$)")  # of a password file; a backslash escapes
_SOCKETS = "/var/run/postgresql"


class ParameterError(HedgedError):
    """A connection to PostgreSQL that is not described as it has to be."""


def parameters(url: sa.URL, environment: Mapping[str, str]) -> dict[str, str]:
    """The keywords of a connection, by libpq's names.

    What the URL says goes before the service it names, then come variables and defaults. Raises
    ParameterError for a keyword that is not known here and for a service that is not there.
    """
    asked = {k: v if isinstance(v, str) else v[-1] for k, v in url.query.items()}
    parts = {
        "host": url.host,
        "port": url.port,
        "dbname": url.database,
        "user": url.username,
        "password": url.password,
    }
    asked = {k: str(v) for k, v in parts.items() if v} | asked
    set_there = {k: environment[name] for k, name in VARIABLES.items() if environment.get(name)}
    service = asked.get("service", set_there.get("service"))
    found = _DEFAULTS | set_there | (_service(service, environment) if service else {}) | asked
    if unknown := sorted(found.keys() - VARIABLES.keys()):
        raise ParameterError(
            f"{unknown[0]!r} is no keyword of a ledger's connection; known are "
            f"{', '.join(VARIABLES)}"
        )
    if found["sslmode"] not in _SSL_MODES:
        raise ParameterError(f"sslmode is one of {', '.join(_SSL_MODES)}, not {found['sslmode']!r}")
    for name in ("port", "connect_timeout"):
        if not found[name].isdecimal():
            raise ParameterError(f"{name} is a number, not {found[name]!r}")
    if "host" not in found:
        local = Path(_SOCKETS, f".s.PGSQL.{found['port']}").exists()
        found["host"] = _SOCKETS if local else "localhost"
    if "user" not in found:
        found["user"] = _own_name()
    found.setdefault("dbname", found["user"])
    if "password" not in found:
        kept = _kept_password(found)
        found |= {} if kept is None else {"password": kept}
    return found


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in a container
        raise ParameterError("say as which user: postgresql://USER@HOST/DATABASE") from None


def _home(path: str) -> Path:
    """A path whose ~ is resolved; as it stands for a user who has no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _service(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    file = _home(environment.get("PGSERVICEFILE") or "~/.pg_service.conf")
    services = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)
    try:
        services.read_string(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as e:
        raise ParameterError(f"the service file {file} cannot be read ({e})") from e
    if not services.has_section(name):
        raise ParameterError(f"there is no service [{name}] in {file}")
    return dict(services[name])


def _kept_password(found: Mapping[str, str]) -> str | None:
    """The password of the first line that fits, of host:port:dbname:user:password each."""
    try:
        lines = _home(found["passfile"]).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    wanted = [found[k] for k in ("host", "port", "dbname", "user")]
    if wanted[0] == _SOCKETS:
        wanted[0] = "localhost"
    for line in lines:
        fields = [re.sub(r"\\(.)", r"\1", f) for f in _FIELD.findall(line)]
        if line.startswith("#") or len(fields) < 5:
            continue
        if all(f in ("*", w) for f, w in zip(fields, wanted, strict=False)):
            return fields[4]
    return None
