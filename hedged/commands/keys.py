"""``hedged keys``: who may ask the service for what."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from service.keys import Key, Role

_MORE = """`add` prints the key once and stores its SHA-256; a client sends it as
"Authorization: Bearer KEY" or "X-API-Key: KEY". Roles: predict (predictions, metadata, the live
page), labels (labels, calibration), metrics (/metrics), admin (everything). A server that was
started with HEDGED_KEYS=FILE needs a key of every request, and reads the file again when it
changes.

\b
Examples:
  hedged keys add keys.json ci --role predict,labels
  hedged keys list keys.json
  hedged keys revoke keys.json ci
"""


class Action(StrEnum):
    """What to do with the file."""

    add = "add"
    list = "list"
    revoke = "revoke"


def keys(
    action: Annotated[Action, typer.Argument(help="add, list or revoke")],
    file: Annotated[Path, typer.Argument(help="File of keys, JSON")],
    name: Annotated[str | None, typer.Argument(help="What the key is called")] = None,
    role: Annotated[
        str | None, option(help="Of add: predict, labels, metrics, admin; a,b for several")
    ] = None,
    json: Annotated[bool, option("--json", help="Print what was done as JSON")] = False,
) -> None:
    """Make, list and revoke API keys of the service."""
    from service.keys import add_key, read_keys, revoke_key

    if (role is not None) != (action is Action.add):
        raise typer.BadParameter("add needs --role, and nothing else takes it")
    if (name is None) != (action is Action.list):
        raise typer.BadParameter("add and revoke need a NAME, and list takes none")
    if action is Action.list:
        _show(read_keys(file), json)
    elif action is Action.revoke:
        key = revoke_key(file, name or "")
        _say(f"revoked {key.name} in {file}", _record(key), json)
    else:
        key, token = add_key(file, _name(name or ""), _roles(role or ""))
        # The key alone on stdout, so that a script can take it.
        if json:
            console.print_json(_record(key) | {"key": token})
        else:
            console.err.print(f"{key.name} may {', '.join(key.roles)}; this is shown once:")
            typer.echo(token)


keys.__doc__ = f"{keys.__doc__}\n\n{_MORE}"


def _roles(text: str) -> list[Role]:
    from service.keys import ROLES

    given = [part.strip() for part in text.split(",")]
    if unknown := [part for part in given if part not in ROLES]:
        raise typer.BadParameter(f"--role takes {', '.join(ROLES)}, not {unknown[0]!r}")
    return [role for role in ROLES if role in given]


def _name(text: str) -> str:
    import re

    from service.keys import NAME

    if re.fullmatch(NAME, text) is None:
        raise typer.BadParameter(f"a NAME is 1 to 128 of A-Z a-z 0-9 . _ : -, not {text!r}")
    return text


def _show(found: tuple[Key, ...], json: bool) -> None:
    if json:
        console.print_json({"keys": [_record(key) for key in found]})
        return
    table = Table()
    for column in ("name", "roles", "created"):
        table.add_column(column, overflow="fold")
    for key in found:
        table.add_row(key.name, ", ".join(key.roles), key.created.isoformat())
    console.out.print(table)


def _say(text: str, record: dict[str, Any], json: bool) -> None:
    if json:
        console.print_json(record)
    else:
        typer.echo(text)


def _record(key: Key) -> dict[str, Any]:
    return {"name": key.name, "roles": key.roles, "created": key.created.isoformat()}
