"""``hedged demo``: the whole story on a model that a large company deploys."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

from hedged.commands import console
from hedged.commands.console import option


def demo(
    out: Annotated[Path, option(help="Folder of the bundle and the report")] = Path("demo"),
    quick: Annotated[
        bool, option("--quick", help="A quarter of the files: the same story, rougher figures")
    ] = False,
    keep_serving: Annotated[
        bool, option("--keep-serving", help="Leave the server running until Ctrl-C")
    ] = False,
    json: Annotated[bool, option("--json", help="Print every figure as JSON")] = False,
) -> None:
    """Fit, serve, label, watch and score a real frozen model.

    The model is magika, a file-type classifier; the data are files of pinned packages, which
    `make demo` installs.

    \b
    Examples:
      hedged demo
      hedged demo --quick
      hedged demo --out story --keep-serving
    """
    from hedged.demo.story import tell

    for number in (signal.SIGTERM, signal.SIGHUP):  # so that its server ends with it
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    story = tell(out, quick=quick, keep_serving=keep_serving, quiet=json)
    if json:
        console.print_json(story)
