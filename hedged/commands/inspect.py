"""``hedged inspect``, ``hedged verify`` and ``hedged modules``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from posthoc.contract import Info


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    json: Annotated[bool, option("--json", help="Print the manifest as JSON")] = False,
) -> None:
    """Say what a bundle holds, promises and measured.

    \b
    Example:
      hedged inspect bundle
    """
    from calibration.bundle import load_bundle
    from hedged.commands.describe import describe

    found = load_bundle(bundle)
    if json:
        console.print_json(found.manifest.model_dump(mode="json") | {"identity": found.identity})
    else:
        describe(found)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    device: Annotated[str, option(help="auto, cpu, cuda[:n] or tensorrt")] = "cpu",
    signed_by: Annotated[
        Path | None, option(help="Public keys, PEM: one of them must have signed the bundle")
    ] = None,
    certified_by: Annotated[
        list[Path] | None,
        option(help="Root certificate, PEM: it must certify who signed the bundle; repeatable"),
    ] = None,
    signature: Annotated[
        Path | None, option(help="Where the signature lies; default BUNDLE.sig")
    ] = None,
    json: Annotated[bool, option("--json", help="Print the result as JSON")] = False,
) -> None:
    """Check every hash of a bundle and who signed it, then run its golden rows.

    Without --signed-by or --certified-by no signature is asked for.

    \b
    Examples:
      hedged verify bundle
      hedged verify bundle --signed-by key.pub
    """
    from calibration.predictor import Predictor
    from calibration.signing import check_certified, load_signed

    if signed_by is not None and certified_by:
        raise typer.BadParameter("--signed-by or --certified-by, not both")
    if signature is not None and signed_by is None and not certified_by:
        raise typer.BadParameter("--signature needs --signed-by or --certified-by")
    if certified_by:
        found = check_certified(bundle, certified_by, signature)
    else:
        found = load_signed(bundle, signed_by, signature)
    signed = signed_by is not None or bool(certified_by)
    predictor = Predictor(found, device=device)
    predictor.self_check()
    files = predictor.manifest.files
    if json:
        told: dict[str, Any] = {"ok": True, "identity": found.identity, "files": len(files)}
        console.print_json(told | ({"signed": True} if signed else {}))
    else:
        console.out.print(
            f"{bundle}: {len(files)} files match, {'the signature holds, ' if signed else ''}"
            f"golden rows reproduce, identity {found.identity}"
        )


def modules(
    name: Annotated[
        str | None, typer.Argument(help="A module or score: its settings and their defaults")
    ] = None,
    short: Annotated[bool, option("--short", help="Names and summaries alone")] = False,
    json: Annotated[bool, option("--json", help="Print the registry as JSON")] = False,
) -> None:
    """List every module and score, what it needs and its paper.

    \b
    Examples:
      hedged modules
      hedged modules --short
      hedged modules laplace
    """
    from posthoc import registry

    if name is not None and not short:
        _one(name, json)
        return
    names = (*registry.MODULES, *registry.SCORES) if name is None else (name,)
    records = [registry.info(n) for n in names]
    if json:
        console.print_json([_short(r) if short else _record(r) for r in records])
        return
    if short:
        for kind in dict.fromkeys(r.kind for r in records):
            _names([r for r in records if r.kind == kind], title=f"{kind}s")
        return
    table = Table()
    for column in ("name", "kind", "tasks", "needs", "summary", "paper"):
        table.add_column(column, overflow="fold")
    for r in records:
        needs = ", ".join(sorted(r.needs)) or "outputs"
        paper = f"{r.paper.title} ({r.paper.year})"
        table.add_row(r.name, r.kind, ", ".join(r.tasks), needs, r.summary, paper)
    console.out.print(table)


def _names(records: Sequence[Info], title: str) -> None:
    """Names beside their summaries."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for r in records:
        table.add_row(r.name, r.summary)
    console.out.print(table)


def _short(r: Info) -> dict[str, Any]:
    return {"name": r.name, "kind": r.kind, "summary": r.summary}


def _record(r: Info) -> dict[str, Any]:
    return {
        "name": r.name,
        "kind": r.kind,
        "tasks": r.tasks,
        "needs": sorted(r.needs),
        "passes": r.passes,
        "preserves": r.preserves,
        "settings": _settings(r.name),
        "summary": r.summary,
        "paper": {"title": r.paper.title, "year": r.paper.year, "url": r.paper.url},
    }


def _settings(name: str) -> dict[str, Any]:
    """The settings of a module and their defaults; scores have none."""
    from posthoc import registry

    kind = getattr(registry.page(name), "Settings", None)
    return {} if kind is None else kind().model_dump(mode="json")


def _one(name: str, json: bool) -> None:
    from inspect import cleandoc

    from posthoc import registry

    record = registry.info(name)
    if json:
        console.print_json(_record(record))
        return
    say = console.out.print
    say(f"[bold]{record.name}[/] ({record.kind} for {', '.join(record.tasks)}): {record.summary}")
    say(f"{record.paper.title} ({record.paper.year}), {record.paper.url}")
    say(f"needs {', '.join(sorted(record.needs)) or 'outputs only'}")
    if record.either and "classification" in record.tasks:
        say("keeps the frozen label, unless its own is asked for with --prediction module")
    elif not record.preserves:
        say("refits the head: its answer is served, so --prediction module must be asked for")
    settings = _settings(name)
    if not settings:
        say("no settings")
        return
    say("settings, each with --set KEY=VALUE:")
    for key, default in settings.items():
        say(f"  {key} = {'found by the fit' if default is None else default}")
    say(cleandoc(registry.page(name).Settings.__doc__ or "").replace("``", ""), style="dim")
