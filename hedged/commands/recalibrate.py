"""``hedged recalibrate``: a bundle made anew on the labels that came later."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hedged.commands import console
from hedged.commands.ages import seconds
from hedged.commands.console import option

if TYPE_CHECKING:
    from calibration.bundle import Bundle
    from calibration.renew.measure import Figures, Level
    from calibration.renew.renewal import Renewal

NOT_BETTER = 3
_FEW = 50  # served predictions of a confidence bin, below which its label share says little
_MORE = """LEDGER is the SQLite file or the postgresql:// URL of a service, which may go on writing
meanwhile. Its labelled predictions of this very bundle are divided by a hash of their id into
three: one fits the scaling, one gives the conformal ranks, and on the third the new bundle is held
against the old one. The module, the answer itself and the out-of-distribution score stay as they
are. What is promised holds for rows like the labelled ones: let --since reach back no further
than the change that it is for. Rows of before are like none that come, and with some of them
among the others the new bundle misses too much; it is said when the older half of the rows is
unlike the newer one.

The new bundle is written only where its loss (log loss, or CRPS) is surely lower or coverage comes
back into the band that chance allows, and nothing is worse. Exit code 3: it is not better, and
nothing was written. Then make it live: hedged activate ROOT NAME VERSION

\b
Examples:
  hedged recalibrate models/credit/1 --ledger hedged-ledger.sqlite \\
      --since 7d -o models/credit/2
  hedged recalibrate bundle --ledger postgresql://localhost/hedged \\
      --since 36h --only conformal -o renewed

Each option is also a variable: HEDGED_RECALIBRATE_SINCE for --since.
"""


class Only(StrEnum):
    """A part of a bundle that may be renewed alone."""

    conformal = "conformal"


def recalibrate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    ledger: Annotated[str, option(help="SQLite file, or postgresql:// URL")],
    out: Annotated[Path, option("--out", "-o", help="Folder of the new bundle")],
    since: Annotated[
        str, option(help="Age of the oldest prediction to use: 7d, 36h or 2w (s, m, h, d, w)")
    ] = "7d",
    only: Annotated[
        Only | None, option(help="conformal: thresholds alone, the scaling stays")
    ] = None,
    version: Annotated[
        str | None,
        option(help="Version of the new bundle; default: its folder's in a root, else the next"),
    ] = None,
    tolerance: Annotated[
        float | None,
        option(help="Regression: a larger error is wrong; without it abstention stays"),
    ] = None,
    seed: Annotated[int, option(min=0, help="Of the division of the rows")] = 0,
    json: Annotated[bool, option("--json", help="Print what was found as JSON")] = False,
) -> None:
    """Renew a bundle's scaling and thresholds on fresh labels."""
    from calibration.bundle import load_bundle
    from calibration.renew.renewal import renew, summary
    from calibration.renew.write import check_out, version_at, write_renewed
    from service.fresh import fresh

    age = seconds(since, "--since")
    check_out(out)
    old = load_bundle(bundle)
    name = version_at(out, old, version)
    with console.progress() as report:
        rows, window = fresh(ledger, old, time.time() - age, tell=lambda n: report("labels", n, n))
    found = renew(
        old,
        rows,
        window,
        only=None if only is None else "conformal",
        seed=seed,
        tolerance=tolerance,
    )
    new = write_renewed(found, out, name) if found.comparison.publish else None
    if json:
        console.print_json({**summary(found), "published": _published(new)})
    else:
        _show(found, new)
    if new is None:
        raise typer.Exit(NOT_BETTER)


recalibrate.__doc__ = f"{recalibrate.__doc__}\n\n{_MORE}"


def _published(new: Bundle | None) -> dict[str, Any] | None:
    if new is None:
        return None
    return {"path": str(new.path), "version": new.manifest.version, "identity": new.identity}


def _show(found: Renewal, new: Bundle | None) -> None:
    """What went in, what became of it, and before beside after."""
    m = found.opened.manifest
    say = console.out.print
    where = escape(f"version {m.version}, {found.opened.bundle.path}")
    say(f"[bold]{escape(m.name)}[/] {where}")
    _rows(found)
    needs = Table(title="What it takes", title_justify="left")
    for column in ("what", "needs", "has"):
        needs.add_column(column, justify="left" if column == "what" else "right")
    for n in found.needs:
        needs.add_row(escape(n.what), f"{n.needs:,}", f"{n.has:,}")
    say(needs)
    for line in found.renewed:
        say(escape(f"renewed: {line}"))
    for line in found.kept:
        say(escape(f"kept: {line}"))
    _compared(found)
    odd = found.halves is not None and found.halves.unlike
    for i, note in enumerate(found.notes):
        say(f"  {escape(note)}", style="yellow" if odd and i == 0 else "dim")
    if new is None:
        reasons = "; ".join(found.comparison.worse) or "nothing is surely better"
        console.err.print(escape(f"not written: {reasons}"))
        return
    say(escape(f"because {'; '.join(found.comparison.better)}"))
    say(escape(f"{new.path}: version {new.manifest.version}, identity {new.identity}"))


def _rows(found: Renewal) -> None:
    w = found.window
    say = console.out.print
    share = w.labelled / w.served if w.served else 0.0
    say(f"{w.labelled:,} of {w.served:,} predictions have a label ({share:.1%})")
    if w.unfit:
        say(f"{w.unfit:,} labels mean nothing to this bundle and were left out")
    shares = {name: n / served for name, served, n in w.by_confidence if served >= _FEW}
    low, high = (f(shares, key=shares.__getitem__, default="") for f in (min, max))
    if low != high:
        say(
            f"by confidence: from {shares[low]:.1%} (up to {low}) to {shares[high]:.1%} (up to "
            f"{high})"
        )
    parts = ", ".join(f"{name} {n:,}" for name, n in found.parts.items())
    say(f"divided by a hash of the id: {parts}")


def _compared(found: Renewal) -> None:
    c = found.comparison
    table = Table(title=f"On {c.rows:,} labelled rows used for nothing else", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column)
    for name, value in c.before.means.items():
        table.add_row(name, f"{value:.4f}", f"{c.after.means[name]:.4f}")
    for before, after in zip(c.before.levels, c.after.levels, strict=True):
        table.add_row(f"coverage at {before.level}", _level(before), _level(after))
        table.add_row("  mean size", _size(before), _size(after))
    if c.before.answered is not None:
        table.add_row("answered (error)", _answered(c.before), _answered(c.after))
    console.out.print(table)
    d = c.difference
    console.out.print(
        f"{c.loss}, after less before: {d.value:+.4g} ({d.low:+.4g} to {d.high:+.4g})"
    )
    for which, figures in (("before", c.before), ("after", c.after)):
        for level in figures.levels:
            for cell in level.outside:
                console.out.print(escape(f"  {which}, {level.level}, outside its band: {cell}"))


def _level(level: Level) -> str:
    mark = "" if level.inside else " [bold]outside[/]"
    if level.low is None or level.high is None:
        return f"{level.coverage:.4f}{mark}"
    return f"{level.coverage:.4f} ({level.low:.4f}–{level.high:.4f}){mark}"


def _size(level: Level) -> str:
    return "infinite" if level.size is None else f"{level.size:.4g}"


def _answered(figures: Figures) -> str:
    error = "" if figures.answered_error is None else f" ({figures.answered_error:.4f})"
    return f"{figures.answered:.1%}{error}"
