"""What every command shares: progress on stderr, JSON on stdout, parsing of repeated options."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_EVERY_S = 30.0  # between lines of progress where there is no terminal
_WIDTH = None if sys.stdout.isatty() else 110  # a pipe has no width; 80 would break the tables
err = Console(stderr=True, highlight=False)
out = Console(highlight=False, width=_WIDTH)

Report = Callable[[str, int, int], None]


def option(*flags: str, help: str, **more: Any) -> Any:
    """An option of a command. That each is a variable too is said once, in the command's help."""
    return typer.Option(*flags, help=help, show_envvar=False, **more)


class _Rate(ProgressColumn):
    """Steps a second, of the last half minute."""

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s")


@contextmanager
def progress(unit: str | None = None) -> Iterator[Report]:
    """A callback (what, done, total) that tells on stderr how far a run is, with the time left and,
    where a ``unit`` is named, how many of them are done in a second: one bar for each ``what`` on a
    terminal, elsewhere a line now and then."""
    with _bars(unit) if err.is_terminal else nullcontext(_lines(unit)) as report:
        yield report


@contextmanager
def _bars(unit: str | None) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(() if unit is None else (_Rate(unit),)),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bars:
        known: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield report


def _lines(unit: str | None, clock: Callable[[], float] = time.monotonic) -> Report:
    """What a log gets: nothing of what is quick."""
    begun: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        now = clock()
        since, before = begun.setdefault(what, (now, done))
        if now - told.setdefault(what, now) < _EVERY_S:
            return
        told[what] = now
        speed = (done - before) / (now - since)
        rate = "" if unit is None else f", {speed:,.0f} {unit}/s"
        left = f", {timedelta(seconds=round((total - done) / speed))} left" if speed else ""
        err.print(f"{what}: {done:,} of {total:,}{rate}{left}", soft_wrap=True)

    return report


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False, default=str))


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """``name=value`` options as a dict; a usage error for one without ``=``."""
    found: dict[str, str] = {}
    for value in values:
        name, sign, rest = value.partition("=")
        if not sign or not name or not rest:
            raise typer.BadParameter(f"{option} takes name=value, not {value!r}")
        found[name] = rest
    return found


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(v) for v in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers like .1,.05, not {text!r}") from None


def lines(path: Path | None) -> tuple[str, ...] | None:
    """The lines of a text file of names, or None."""
    if path is None:
        return None
    try:
        return tuple(x.strip() for x in path.read_text().splitlines() if x.strip())
    except OSError as e:
        raise typer.BadParameter(
            f"{path}: {e.strerror}; it takes a file of names, one a line"
        ) from None
