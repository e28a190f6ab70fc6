"""Write the shipped rules and dashboard anew: ``python -m service.alerting [DEPLOY]``."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from service.alerting import dashboard_text, rules_text

_OBJECT = """\
# Made by `python -m service.alerting` from the rules that ../../prometheus/rules.yml has.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hedged
  labels:
    release: kube-prometheus-stack
spec:
"""


def rule_object() -> str:
    """The rules as an object of the Prometheus operator."""
    return _OBJECT + textwrap.indent(rules_text(), "  ")


FILES = {
    "prometheus/rules.yml": rules_text,
    "kubernetes/monitoring/prometheusrule.yaml": rule_object,
    "grafana/dashboards/hedged.json": dashboard_text,
}


def main(folder: Path) -> None:
    """Write every file of FILES below ``folder``."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), "utf-8")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "deploy"))
