"""A ledger that is watched: what is new in it, fed to its streams and monitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from calibration.drift import risk_monitor, samples
from calibration.drift.risk_monitor import RiskMonitor
from calibration.drift.samples import SampleTotals
from posthoc.contract import F64
from service.labels import Joined, totals_of
from service.monitor import kinds as shift
from service.monitor.fields import Key, labelled_streams, served_streams
from service.monitor.following import Cursor, Predicted, labels_after, predictions_after
from service.monitor.kinds import Kinds
from service.monitor.promises import Promises, with_labels
from service.monitor.stream import Options, Stream, feed

ERROR = 0.05  # of the bounds on coverage of a level, over all time
_NONE: Mapping[Key, Promises] = {}


@dataclass(frozen=True, slots=True)
class Watch:
    """How far a ledger was read, and the streams by model, version and name; ``rows`` and
    ``latest`` (seconds since the epoch) of the predictions of each model and version; ``coverage``
    by model, version and level, each level with an error of its own; ``promises`` of those whose
    bundles are known; ``samples`` as EATA's filter sees them; ``kinds`` of shift."""

    cursor: Cursor = field(default_factory=Cursor)
    streams: Mapping[Key, Mapping[str, Stream]] = field(default_factory=dict)
    coverage: Mapping[Key, Mapping[str, RiskMonitor]] = field(default_factory=dict)
    promises: Mapping[Key, Promises] = field(default_factory=dict)
    samples: Mapping[Key, SampleTotals] = field(default_factory=dict)
    kinds: Mapping[Key, Kinds] = field(default_factory=dict)
    rows: Mapping[Key, int] = field(default_factory=dict)
    latest: Mapping[Key, float] = field(default_factory=dict)


def look(
    conn: sa.Connection,
    watch: Watch,
    options: Options,
    until: float,
    bundles: Mapping[Key, Promises] = _NONE,
) -> tuple[Watch, int]:
    """The watch after one page of what is new and was made or joined until then, and how many rows
    that was. Younger rows are for later looks: others may still come before them.

    What ``bundles`` promise is watched from this page on, unless the same bundle's already is; what
    is watched once goes on without them.
    """
    pages, cursor = predictions_after(conn, watch.cursor, until)
    labelled, cursor = labels_after(conn, cursor, until)
    begun = replace(watch, cursor=cursor, promises=_begun(watch.promises, bundles))
    found = _with_labels(_with_predictions(begun, pages, options), labelled, options)
    return found, sum(len(page.time) for page in pages) + len(labelled)


def _with_predictions(watch: Watch, pages: Sequence[Predicted], options: Options) -> Watch:
    """The watch after predictions, whatever needs no label."""
    streams = {key: dict(known) for key, known in watch.streams.items()}
    seen, kinds = dict(watch.samples), dict(watch.kinds)
    rows, latest = dict(watch.rows), dict(watch.latest)
    for page in pages:
        key = page.source.model, page.source.version
        _feed(streams.setdefault(key, {}), served_streams(page), options)
        if page.probs is not None:
            before = seen.get(key) or samples.start(page.probs.shape[1])
            seen[key] = samples.update(before, page.probs)
            kinds[key] = shift.feed(kinds.get(key, Kinds()), page, options)
        rows[key] = rows.get(key, 0) + len(page.time)
        latest[key] = max(latest.get(key, 0.0), float(page.time.max()))
    return replace(watch, streams=streams, samples=seen, kinds=kinds, rows=rows, latest=latest)


def _with_labels(watch: Watch, labelled: Sequence[Joined], options: Options) -> Watch:
    """The watch after joined labels."""
    streams = {key: dict(known) for key, known in watch.streams.items()}
    coverage = {key: dict(known) for key, known in watch.coverage.items()}
    promises = dict(watch.promises)
    for key, totals in totals_of(labelled).items():
        levels = coverage.setdefault(key, {})
        for level, sums in totals.levels.items():
            # Its bounds are what is read, and they need no floor.
            bound = levels.get(level) or risk_monitor.start(float(level), ERROR)
            levels[level] = risk_monitor.update(bound, sums.labeled, sums.covered)
        if key in promises:
            promises[key] = with_labels(promises[key], totals)
    for key, told in labelled_streams(labelled).items():
        _feed(streams.setdefault(key, {}), told, options)
    return replace(watch, streams=streams, coverage=coverage, promises=promises)


def _feed(streams: dict[str, Stream], told: Mapping[str, F64], options: Options) -> None:
    for name, values in told.items():
        streams[name] = feed(streams.get(name, Stream()), values, options)


def _begun(known: Mapping[Key, Promises], bundles: Mapping[Key, Promises]) -> dict[Key, Promises]:
    """What is watched, with those beside it that are new, and in place of what was watched of
    another bundle under the same version."""
    new = {
        key: one
        for key, one in bundles.items()
        if key not in known or known[key].identity != one.identity
    }
    return {**known, **new}
