"""One rule or alert, and how it is written as YAML."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

_WIDTH = 92


@dataclass(frozen=True, slots=True)
class Rule:
    """A recorded series ``level:metric:operations``; ``why`` is a comment above it."""

    record: str
    expr: str
    why: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert. ``runbook`` says what to do; ``for_`` is a duration, ``0s`` for at once."""

    name: str
    expr: str
    for_: str
    severity: str
    summary: str
    description: str
    runbook: str
    why: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def increase(level: str, metric: str, window: str, gone: str, why: str = "") -> Rule:
    """The increase of a counter over a window, summed over what ``gone`` tells apart."""
    name = f"{level}:{metric.removesuffix('_total')}:increase{window}"
    return Rule(name, f"sum without ({gone}) (increase({metric}[{window}]))", why)


def ratio(record: str, above: str, below: str, why: str = "") -> Rule:
    """One expression over another, where that is above 0: no labels make no figure, not NaN."""
    return Rule(record, f"  {above}\n/\n  ({below} > 0)", why)


def group_text(name: str, interval: str, rules: Sequence[Rule | Alert], why: str = "") -> str:
    """A group of rules as YAML, below ``groups:``."""
    head = f"{_comment(why, 2)}  - name: {name}\n    interval: {interval}\n    rules:\n"
    return head + "".join(map(_text, rules)).removeprefix("\n")


def _text(rule: Rule | Alert) -> str:
    lines = [_comment(rule.why, 6) or "\n" * isinstance(rule, Alert)]
    if isinstance(rule, Rule):
        lines += [f"      - record: {rule.record}\n", _expr(rule.expr)]
    else:
        lines += [f"      - alert: {rule.name}\n", _expr(rule.expr), f"        for: {rule.for_}\n"]
    labels = rule.labels if isinstance(rule, Rule) else {"severity": rule.severity, **rule.labels}
    if labels:
        lines += ["        labels:\n"]
        lines += [f"          {k}: {json.dumps(v)}\n" for k, v in labels.items()]
    if isinstance(rule, Alert):
        lines += ["        annotations:\n"]
        for key in ("summary", "description", "runbook"):
            # A JSON string is a YAML string, whatever is in it.
            lines += [f"          {key}: {json.dumps(getattr(rule, key), ensure_ascii=False)}\n"]
    return "".join(lines)


def _expr(expr: str) -> str:
    if "\n" not in expr:
        return f"        expr: {expr}\n"
    return f"        expr: |2\n{textwrap.indent(expr, ' ' * 10)}\n"


def _comment(why: str, indent: int) -> str:
    if not why:
        return ""
    lines = textwrap.wrap(" ".join(why.split()), _WIDTH)
    return "\n" + "".join(f"{' ' * indent}# {line}\n" for line in lines)
