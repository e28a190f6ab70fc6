"""What the demo prints for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from hedged.commands import console


class Teller:
    """Prints the steps on stdout."""

    def step(self, text: str) -> None:
        """A heading."""
        console.out.rule(f"[bold]{text}", align="left")

    def line(self, text: str) -> None:
        """A sentence."""
        console.out.print(text)

    def table(self, table: Table) -> None:
        """A table."""
        console.out.print(table)


class Silent(Teller):
    """Says each step on stderr and nothing else, so that stdout holds JSON alone."""

    def step(self, text: str) -> None:
        """A heading."""
        console.err.print(text)

    def line(self, text: str) -> None:
        """Nothing."""

    def table(self, table: Table) -> None:
        """Nothing."""


def examples(answers: Sequence[dict[str, Any]]) -> Table:
    """Predictions with sets and flags for a few recognisable files."""
    table = Table(title="A few files", title_justify="left")
    for column in ("file", "label", "confidence", "90 % set", "98 % set", "epistemic", "flag"):
        table.add_column(column)
    for a in answers:
        table.add_row(
            a["what"],
            a["label"],
            f"{a['confidence']:.3f}",
            _set(a["set"]),
            _set(a["wide_set"]),
            f"{a['epistemic']:.3f}",
            f"strange (p {a['ood_pvalue']:.3f})" if a["ood"] else "",
        )
    return table


def _set(names: Sequence[str]) -> str:
    more = f", and {len(names) - 4} more" if len(names) > 4 else ""
    return "{" + ", ".join(names[:4]) + more + "}"


def comparison(story: dict[str, Any]) -> Table:
    """Frozen beside temperature-scaled beside hedged."""
    table = Table(title=f"On {story['test_rows']:,} rows the fit never used", title_justify="left")
    for column in ("", "frozen", "temperature scaled", "hedged"):
        table.add_column(column)
    for key in ("accuracy", "nll", "ece", "brier"):
        cells = [story[s][key] for s in ("frozen", "temperature_scaled", "hedged")]
        table.add_row(key, *(f"{c:.4f}" for c in cells))
    for alpha, coverage in story["coverage"].items():
        low, high = story["coverage_band"][alpha]
        table.add_row(
            f"coverage at {1 - float(alpha):.0%} (luck: {low:.3f}–{high:.3f})",
            "no sets",
            "no sets",
            f"{coverage:.4f}, mean set {story['set_size'][alpha]:.2f}",
        )
    auroc = story["ood_auroc"]
    table.add_row("AUROC for unknown types", f"{auroc['msp']:.4f}", "", f"{auroc['hedged']:.4f}")
    table.add_row("throughput at batch 32", "1", "", f"{story['overhead_ratio']:.3f}")
    return table
