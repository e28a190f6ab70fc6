"""``hedged alerting``: Prometheus rules and a Grafana dashboard, made for one's own windows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hedged.commands.console import option

_MORE = """`rules` are recording rules and alerts for Prometheus; `dashboard` is JSON for Grafana
and names the same windows. Both go to stdout, or to --out. Those in deploy/ were made with the
defaults. Durations are written as Prometheus does: 30s, 5m, 1h, 1d.

\b
Examples:
  hedged alerting rules --out rules.yml
  hedged alerting rules --windows 10m,6h --alert-windows 6h --min-labels 500
  hedged alerting dashboard --out hedged.json
"""


class What(StrEnum):
    """What to make."""

    rules = "rules"
    dashboard = "dashboard"


def alerting(
    what: Annotated[What, typer.Argument(help="rules or dashboard")],
    windows: Annotated[
        str, option(help="That every figure is recorded over, the shortest first")
    ] = "5m,1h,1d",
    alert_windows: Annotated[
        str, option(help="Those over which calibration and coverage are judged")
    ] = "1h,1d",
    for_: Annotated[
        str, option("--for", help="How long calibration or coverage must be bad")
    ] = "30m",
    service_for: Annotated[str, option(help="How long the service must be bad")] = "5m",
    interval: Annotated[str, option(help="Between two evaluations")] = "1m",
    min_labels: Annotated[
        int, option(help="Labels in a window below which it is not judged")
    ] = 200,
    label_silence: Annotated[str, option(help="Without any label before one is told")] = "1d",
    job: Annotated[str, option(help="Name of the service's scrape job")] = "hedged",
    monitor_job: Annotated[str, option(help="Name of the monitor's")] = "hedged-monitor",
    out: Annotated[Path | None, option(help="File to write; default: stdout")] = None,
) -> None:
    """Make Prometheus rules and alerts, or a Grafana dashboard."""
    from service.alerting import Options, dashboard_text, rules_text

    options = Options(
        windows=_list(windows),
        alert_windows=_list(alert_windows),
        for_=for_,
        service_for=service_for,
        interval=interval,
        min_labels=min_labels,
        label_silence=label_silence,
        job=job,
        monitor_job=monitor_job,
    )
    text = (rules_text if what is What.rules else dashboard_text)(options)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, "utf-8")


alerting.__doc__ = f"{alerting.__doc__}\n\n{_MORE}"


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
