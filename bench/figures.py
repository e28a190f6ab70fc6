"""The figures that README and docs quote, each a sentence made of what a benchmark found and kept.

`rows` reads ``bench/results``; the part ``figures`` of docs/measured.md is made of it, and a test
compares the two. A figure of a benchmark whose file is not there is not quoted. What another
machine made is kept as NAME@MACHINE.
"""

from __future__ import annotations

from bench import figures_methods, figures_service
from bench.results import kept

FIGURES = (*figures_methods.FIGURES, *figures_service.FIGURES)


def rows() -> list[tuple[str, str, str]]:
    """(what, value, command) of every figure whose benchmark was kept, in order."""
    found = {f.bench: kept(f.bench) for f in FIGURES}
    made = []
    for figure in FIGURES:
        if (it := found[figure.bench]) is not None:
            quick = " --quick" if it.get("quick") else ""
            name = figure.bench.partition("@")[0]
            command = f"`python -m bench {name}{quick} --json`"
            made.append((figure.what, figure.value(it), command))
    return made
