"""What watches a service from outside: Prometheus rules and alerts, and a Grafana dashboard.

``rules_text(Options())`` is ``deploy/prometheus/rules.yml``, ``dashboard_text(Options())`` is
``deploy/grafana/dashboards/hedged.json``; ``python -m service.alerting`` writes both. Both name
metrics of `service.metrics` only, and none is read here: this is text.
"""

from service.alerting.dashboard import dashboard_text as dashboard_text
from service.alerting.false_pages import expected_false_pages as expected_false_pages
from service.alerting.options import AlertingError as AlertingError
from service.alerting.options import Options as Options
from service.alerting.rules import rules_text as rules_text
