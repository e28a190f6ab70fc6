"""A ledger that is watched: what is new in it, fed to its streams, and kept on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from calibration.drift import risk_monitor, samples
from calibration.drift.risk_monitor import RiskMonitor
from calibration.drift.samples import SampleTotals
from posthoc.contract import DataError
from service import account
from service.labels import totals_of
from service.monitor.fields import Key, labelled_streams, served_streams
from service.monitor.following import Cursor, labels_after, predictions_after
from service.monitor.stream import Options, Stream, feed, from_json, to_json

ERROR = 0.05  # of the bounds on coverage, over all time
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Watch:
    """How far a ledger was read, and the streams by model, version and name; ``rows`` and
    ``latest`` (seconds since the epoch) of the predictions of each model and version; ``coverage``
    by model, version and level; ``samples`` as EATA's filter sees them."""

    cursor: Cursor = field(default_factory=Cursor)
    streams: Mapping[Key, Mapping[str, Stream]] = field(default_factory=dict)
    coverage: Mapping[Key, Mapping[str, RiskMonitor]] = field(default_factory=dict)
    samples: Mapping[Key, SampleTotals] = field(default_factory=dict)
    rows: Mapping[Key, int] = field(default_factory=dict)
    latest: Mapping[Key, float] = field(default_factory=dict)


def look(conn: sa.Connection, watch: Watch, options: Options, until: float) -> tuple[Watch, int]:
    """The watch after one page of what is new and was made or joined until then, and how many rows
    that was. Younger rows are for later looks: others may still come before them."""
    streams = {key: dict(known) for key, known in watch.streams.items()}
    seen, rows, latest = dict(watch.samples), dict(watch.rows), dict(watch.latest)
    found, cursor = predictions_after(conn, watch.cursor, until)
    labelled, cursor = labels_after(conn, cursor, until)
    for page in found:
        key = page.source.model, page.source.version
        known = streams.setdefault(key, {})
        for name, values in served_streams(page).items():
            known[name] = feed(known.get(name, Stream()), values, options)
        if page.probs is not None:
            before = seen.get(key) or samples.start(page.probs.shape[1])
            seen[key] = samples.update(before, page.probs)
        rows[key] = rows.get(key, 0) + len(page.time)
        latest[key] = max(latest.get(key, 0.0), float(page.time.max()))
    coverage = {key: dict(known) for key, known in watch.coverage.items()}
    for key, totals in totals_of(labelled).items():
        levels = coverage.setdefault(key, {})
        for level, sums in totals.levels.items():
            # Its bounds are what is read, and they need no floor.
            bound = levels.get(level) or risk_monitor.start(float(level), ERROR)
            levels[level] = risk_monitor.update(bound, sums.labeled, sums.covered)
    for key, told in labelled_streams(labelled).items():
        known = streams.setdefault(key, {})
        for name, values in told.items():
            known[name] = feed(known.get(name, Stream()), values, options)
    read = sum(len(page.time) for page in found) + len(labelled)
    return Watch(cursor, streams, coverage, seen, rows, latest), read


def windowed(conn: sa.Connection, window_s: float) -> list[dict[str, Any]]:
    """Calibration of the predictions of the last ``window_s`` seconds, an object per model and
    version; see `service.summary`."""
    since = time.time() - window_s
    models: list[dict[str, Any]] = account.calibration(conn, None, since)["models"]
    return models


def save(watch: Watch, options: Options, file: Path) -> None:
    """Write the watch to a file, whole or not at all."""
    text = json.dumps(
        {
            "format": _FORMAT,
            "options": asdict(options),
            "cursor": asdict(watch.cursor),
            "models": [
                {
                    "model": model,
                    "version": version,
                    "rows": watch.rows.get((model, version), 0),
                    "latest": watch.latest.get((model, version), 0.0),
                    "streams": {name: to_json(stream) for name, stream in known.items()},
                    "samples": (
                        None
                        if (totals := watch.samples.get((model, version))) is None
                        else samples.to_json(totals)
                    ),
                    "coverage": {
                        level: risk_monitor.to_json(one)
                        for level, one in watch.coverage.get((model, version), {}).items()
                    },
                }
                for (model, version), known in watch.streams.items()
            ],
        },
        allow_nan=False,
    )
    part = file.with_name(f"{file.name}.part")
    with part.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def restore(file: Path, options: Options) -> Watch:
    """The watch of a file; a new one where there is none.

    Raises DataError for a file that is no such watch, or was made with other options: evidence
    that was gathered in another way cannot be gone on with.
    """
    if not file.exists():
        return Watch()
    try:
        saved = json.loads(file.read_text())
        if saved["format"] != _FORMAT:
            raise DataError(f"{file}: format {saved['format']}, and this hedged knows {_FORMAT}")
        if saved["options"] != asdict(options):
            raise DataError(
                f"{file} was made with {saved['options']}, not {asdict(options)}: use these "
                "options again, or another --state"
            )
        models = {(m["model"], m["version"]): m for m in saved["models"]}
        return Watch(
            cursor=Cursor(**saved["cursor"]),
            streams={
                key: {name: from_json(s) for name, s in m["streams"].items()}
                for key, m in models.items()
            },
            coverage={
                key: {level: risk_monitor.from_json(s) for level, s in m["coverage"].items()}
                for key, m in models.items()
            },
            samples={
                key: samples.from_json(m["samples"])
                for key, m in models.items()
                if m["samples"] is not None
            },
            rows={key: m["rows"] for key, m in models.items()},
            latest={key: m["latest"] for key, m in models.items()},
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"{file} is no saved monitor ({e!r}); delete it to begin again") from e
