"""The parts of the pages that come from the code; ``python -m tests.documentation`` renews them.

A part stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``; tests/test_docs.py fails while
one of them differs from what is made here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from bench import figures
from docs.pages import pages
from hedged.cli import app
from posthoc import registry
from posthoc.contract import PREDICTIONS, output_fields
from service import metrics as registered
from service.scoring.schema import DESCRIPTIONS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
# Every page of the documentation, README first, in the order in which somebody reads them.
PAGES = tuple(file for _, file in pages())
PART = re.compile(r"(<!-- begin: (\S+) -->\n)(.*?)(<!-- end -->)", re.S)
COMMANDS = tuple(c.name for c in app.registered_commands if c.name is not None)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [tuple(head), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    cells = [[c.replace("|", "\\|").replace("<", "&lt;") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def help_text(*command: str) -> str:
    """What ``hedged COMMAND --help`` prints in a terminal of 80 columns."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    done = subprocess.run(
        [sys.executable, "-m", "hedged", *command, "--help"],
        env=environment | {"COLUMNS": "80", "TERMINAL_WIDTH": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    text = done.stdout.replace("python -m hedged", "hedged")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def commands() -> str:
    """The help of every command."""
    parts = []
    for name in COMMANDS:
        text = help_text(name)
        parts.append(f"## `hedged {name}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def settings() -> str:
    """Variables of the service, their defaults and meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append((f"`{PREFIX}{name.upper()}`", default, field.description or ""))
    return table(("variable", "default", "meaning"), rows)


def metric_families() -> dict[str, MetricWrapperBase]:
    """The service's metrics by the name under which their samples appear, less the suffix of a
    histogram."""
    found = {}
    for value in vars(registered).values():
        if isinstance(value, MetricWrapperBase):
            family = next(iter(value.describe()))
            found[family.name + ("_total" if family.type == "counter" else "")] = value
    return found


def metrics() -> str:
    """Every metric of ``/metrics``."""
    rows = []
    for name, metric in metric_families().items():
        family = next(iter(metric.describe()))
        labels = ", ".join(f"`{n}`" for n in metric._labelnames)
        rows.append((f"`{name}`", family.type, labels, family.documentation))
    return table(("metric", "type", "labels", "meaning"), rows)


def modules() -> str:
    """The registry."""
    rows = []
    for name in (*registry.MODULES, *registry.SCORES):
        info = registry.info(name)
        needs = ", ".join(sorted(info.needs)).replace("_", " ") or "outputs only"
        paper = f"[{info.paper.title}]({info.paper.url}), {info.paper.year}"
        rows.append((f"`{name}`", info.kind, ", ".join(info.tasks), needs, info.summary, paper))
    return table(("name", "kind", "tasks", "needs", "what", "paper"), rows)


def fields() -> str:
    """What a prediction holds, by task."""
    rows = []
    for name in dict.fromkeys(n for task in PREDICTIONS for n in output_fields(task)):
        tasks = [task for task in PREDICTIONS if name in output_fields(task)]
        where = "both" if len(tasks) == len(PREDICTIONS) else tasks[0]
        rows.append((f"`{name}`", where, DESCRIPTIONS[name]))
    return table(("field", "task", "meaning"), rows)


def measured() -> str:
    """What the benchmarks found whose results are kept."""
    return table(("figure", "value", "command"), figures.rows())


PARTS: dict[str, Callable[[], str]] = {
    "figures": measured,
    "commands": commands,
    "settings": settings,
    "metrics": metrics,
    "modules": modules,
    "fields": fields,
}


def renewed(text: str) -> str:
    """The same page with every part made anew."""
    return PART.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text("utf-8")), "utf-8")
