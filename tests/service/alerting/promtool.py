"""promtool on rules and on streams that a test makes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[3] / "deploy"
Series = Mapping[str, str]  # Prometheus's name of a series → its values


def promtool(folder: Path, *arguments: str) -> None:
    """Run promtool in a folder; AssertionError with its words where it complains."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]


def unit_tests(
    folder: Path, rules: str, tests: Iterable[Mapping[str, Any]], evaluation_interval: str
) -> None:
    """``promtool test rules`` of tests on the text of a rule file."""
    (folder / "rules.yml").write_text(rules)
    suite = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": evaluation_interval,
        "group_eval_order": [group["name"] for group in yaml.safe_load(rules)["groups"]],
        "tests": list(tests),
    }
    (folder / "tests.yml").write_text(yaml.safe_dump(suite, sort_keys=False))
    promtool(folder, "test", "rules", "tests.yml")


def input_series(series: Series) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in series.items()]


def all_rules(text: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def selector(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{k}="{v}"' for k, v in labels.items())
    return f"{name}{{{inside}}}"


def line(parts: Sequence[tuple[float, int]], start: float = 0.0) -> str:
    """The values of a counter that begins at ``start`` and grows by ``step`` for ``n`` intervals,
    for each (step, n)."""
    value, found = start, [f"{start!r}"]
    for step, n in parts:
        found.append(f"{value + step!r}+{step!r}x{n - 1}")
        value += step * n
    return " ".join(found)
