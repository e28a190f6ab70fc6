"""``hedged demo``: the whole story on a model that a large company deploys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedged.commands import console


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the bundle and the report")] = Path("demo"),
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave the server running until Ctrl-C")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Every figure on stdout")] = False,
) -> None:
    """Fit, compile, serve, label, watch and score a real frozen model. Example: hedged demo"""
    from hedged.demo.story import tell

    story = tell(out, keep_serving=keep_serving, quiet=json)
    if json:
        console.print_json(story)
