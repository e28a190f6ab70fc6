"""All rules and alerts as one file for Prometheus."""

from __future__ import annotations

from dataclasses import replace

from service.alerting import calibration, traffic
from service.alerting.alerts import calibration_alerts, drift_alerts, label_alerts
from service.alerting.options import Options
from service.alerting.outages import service_alerts
from service.alerting.rule import Alert, Rule, group_text

_HEAD = """\
# Made by `python -m service.alerting`; options of service.alerting.Options change it.
#
# Per model and version, from the counters of every worker and replica. Numerators and denominators
# are recorded apart, so that they can be summed further: never take a mean of ratios. Figures over
# a window count what came within it, predictions and labels alike.
groups:
"""


def groups(options: Options) -> dict[str, list[Rule | Alert]]:
    """Rules and alerts by group, each after those that it reads. What is recorded over one window
    is one group: its rules are evaluated at one moment, so that ratios are of the same rows."""
    found: dict[str, list[Rule | Alert]] = {"uq_now": [*calibration.current(options)]}
    parts = (
        calibration.calibration,
        calibration.coverage,
        traffic.predictions,
        traffic.drift,
        traffic.service,
    )
    said: set[str] = set()
    for w in options.windows:
        rules = [rule for make in parts for rule in make(w, options)]
        # What holds for every window is said once.
        found[f"uq_{w}"] = [replace(r, why="") if r.why in said else r for r in rules]
        said |= {r.why for r in rules}
    alerts = (calibration_alerts, label_alerts, drift_alerts, service_alerts)
    return found | {"uq_alerts": [alert for make in alerts for alert in make(options)]}


def rules_text(options: Options | None = None) -> str:
    """The YAML of a rule file, with the reasons as comments."""
    o = options or Options()
    return _HEAD + "\n".join(
        group_text(name, o.interval, rules) for name, rules in groups(o).items()
    )
