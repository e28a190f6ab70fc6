"""Write the shipped rules and dashboard anew: ``python -m service.alerting [DEPLOY]``."""

from __future__ import annotations

import sys
from pathlib import Path

from service.alerting import dashboard_text, rules_text

FILES = {"prometheus/rules.yml": rules_text, "grafana/dashboards/hedged.json": dashboard_text}


def main(folder: Path) -> None:
    """Write every file of FILES below ``folder``."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), "utf-8")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "deploy"))
