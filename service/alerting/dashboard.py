"""The Grafana dashboard: trust, drift, labels and service, from what the rules record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.alerting.options import Options
from service.alerting.panels import ROWS, Panel

UID = "hedged"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT = 24, 8


def dashboard(options: Options) -> dict[str, Any]:
    """The dashboard as Grafana's JSON model (schema version 39, Grafana 10.4 and later)."""
    return {
        "uid": UID,
        "title": "Hedged: can the predictions be trusted?",
        "description": "Calibration, drift, labels and service of models that Hedged serves.",
        "tags": ["hedged"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "1m",
        "time": {"from": "now-24h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables(options)},
        "annotations": {"list": []},
        "links": [],
        "panels": _placed(ROWS, options.windows[-1]),
    }


def dashboard_text(options: Options | None = None) -> str:
    """The dashboard as JSON text for a folder that Grafana provisions from."""
    return json.dumps(dashboard(options or Options()), indent=2, ensure_ascii=False) + "\n"


def _placed(rows: Mapping[str, Sequence[Panel]], longest: str) -> list[dict[str, Any]]:
    """Panels with ids and places: left to right, top to bottom, below the title of their row."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + _HEIGHT
            place = {"x": x, "y": y, "w": panel.width, "h": _HEIGHT}
            found.append({"id": len(found) + 1, "gridPos": place, **_panel(panel, longest)})
            x += panel.width
        y += _HEIGHT
    return found


def _panel(panel: Panel, longest: str) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.least is not None:
        defaults["min"] = panel.least
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 0, "spanNulls": False}
        options: dict[str, Any] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        }
    else:
        options = {
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    instant = panel.kind != "timeseries"
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": expr.replace("$longest", longest),
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
            }
            for i, (expr, legend) in enumerate(panel.targets)
        ],
    }


def _variables(options: Options) -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "hide": 0,
        },
        _values("model", "label_values(uq_predictions_total, model)"),
        _values("version", 'label_values(uq_predictions_total{model=~"$model"}, version)'),
        {
            "name": "window",
            "label": "Window",
            "type": "custom",
            "query": ",".join(options.windows),
            "current": _chosen(options.alert_windows[0]),
            "options": [_chosen(w, w == options.alert_windows[0]) for w in options.windows],
            "hide": 0,
        },
    ]


def _values(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # when the time range changes, too
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


def _chosen(window: str, selected: bool = True) -> dict[str, Any]:
    return {"text": window, "value": window, "selected": selected}
