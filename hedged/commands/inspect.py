"""``hedged inspect``, ``hedged verify`` and ``hedged modules``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option


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
    json: Annotated[bool, option("--json", help="Print the result as JSON")] = False,
) -> None:
    """Check every hash of a bundle, then run its golden rows.

    \b
    Example:
      hedged verify bundle
    """
    from calibration.predictor import Predictor

    predictor = Predictor(bundle, device=device)
    predictor.self_check()
    files = predictor.manifest.files
    if json:
        console.print_json({"ok": True, "identity": predictor.bundle.identity, "files": len(files)})
    else:
        console.out.print(
            f"{bundle}: {len(files)} files match, golden rows reproduce, "
            f"identity {predictor.bundle.identity}"
        )


def modules(
    json: Annotated[bool, option("--json", help="Print the registry as JSON")] = False,
) -> None:
    """List every module and score, what it needs and its paper.

    \b
    Example:
      hedged modules
    """
    from posthoc import registry

    records = [registry.info(n) for n in (*registry.MODULES, *registry.SCORES)]
    if json:
        console.print_json(
            [
                {
                    "name": r.name,
                    "kind": r.kind,
                    "tasks": r.tasks,
                    "needs": sorted(r.needs),
                    "passes": r.passes,
                    "preserves": r.preserves,
                    "summary": r.summary,
                    "paper": {"title": r.paper.title, "year": r.paper.year, "url": r.paper.url},
                }
                for r in records
            ]
        )
        return
    table = Table()
    for column in ("name", "kind", "tasks", "needs", "summary", "paper"):
        table.add_column(column, overflow="fold")
    for r in records:
        needs = ", ".join(sorted(r.needs)) or "outputs"
        paper = f"{r.paper.title} ({r.paper.year})"
        table.add_row(r.name, r.kind, ", ".join(r.tasks), needs, r.summary, paper)
    console.out.print(table)
