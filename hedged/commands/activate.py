"""``hedged activate``: which version of a model a root of bundles serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hedged.commands import console
from hedged.commands.console import option


def activate(
    root: Annotated[Path, typer.Argument(help="ROOT of ROOT/<name>/<version>/")],
    name: Annotated[str, typer.Argument(help="Name of the model")],
    version: Annotated[
        str | None, typer.Argument(help="Version to serve; without it, the versions are listed")
    ] = None,
    device: Annotated[str, option(help="auto, cpu, cuda[:n] or tensorrt: for the check")] = "cpu",
    signed_by: Annotated[
        Path | None, option(help="Public keys, PEM: one of them must have signed the version")
    ] = None,
    json: Annotated[bool, option("--json", help="Print the result as JSON")] = False,
) -> None:
    """Make a version live, after checking its hashes and golden rows.

    Servers of ROOT check it once more and switch within HEDGED_POLL_S seconds, without failing a
    request. One that refuses the version says why in its log and under swap_error of
    GET /v2/models/NAME; running the command again makes it try again.

    \b
    Examples:
      hedged activate models credit 2
      hedged activate models credit
    """
    from service.bundles import bundle_versions, model_folder

    folder = model_folder(root, name)
    versions = bundle_versions(folder)
    live, problem = _live(folder)
    if version is None:
        result: dict[str, Any] = {"name": name, "live": live, "versions": versions}
        console.print_json(result) if json else _show(result, problem)
        return
    identity = _make_live(folder, name, version, versions, device, signed_by)
    if json:
        console.print_json(
            {"name": name, "version": version, "previous": live, "identity": identity}
        )
        return
    before = "none was" if live is None else f"was {live}"
    console.out.print(escape(f"{name}: version {version} is live ({before}), identity {identity}"))


def _make_live(
    folder: Path,
    name: str,
    version: str,
    versions: list[str],
    device: str,
    signed_by: Path | None,
) -> str:
    """Check the version as a server does, and name it in active.json; its identity."""
    from posthoc.contract import BundleError
    from service.bundles import write_active
    from service.models import load_live

    if version not in versions:
        there = ", ".join(versions) or "none"
        raise BundleError(f"{folder} has no version {version!r}; there are {there}")
    model = load_live(name, folder / version, device=device, threads=0, signed_by=signed_by)
    write_active(folder, version)
    return model.identity


def _live(folder: Path) -> tuple[str | None, str]:
    """The version that is live now; or None, and why there is none."""
    from posthoc.contract import BundleError
    from service.bundles import live_version

    try:
        return live_version(folder), ""
    except BundleError as e:
        return None, str(e)


def _show(result: dict[str, Any], problem: str) -> None:
    for version in result["versions"]:
        mark = "  live" if version == result["live"] else ""
        console.out.print(escape(f"{version}{mark}"))
    if problem:
        console.err.print(escape(f"none is live: {problem}"))
