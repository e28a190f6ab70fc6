"""What a watch found, as plain JSON values for whoever asks once. Null stands for "not known"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from calibration.drift.alert import coverage_threshold
from calibration.drift.label_free import EXPECTED_ASSUMES, STRATIFIED_ASSUMES
from calibration.drift.risk_monitor import RiskMonitor
from calibration.drift.shift_kind import ASSUMES as KINDS_ASSUME
from calibration.drift.shift_kind import Shift
from service.monitor.kinds import statement
from service.monitor.promises import Promises
from service.monitor.stream import Options, Stream
from service.monitor.watch import ERROR, Watch
from service.monitor.window import bounds_of

ASSUMES = {
    "expected": EXPECTED_ASSUMES,
    "stratified": STRATIFIED_ASSUMES,
    "kinds": KINDS_ASSUME,
}


def told(watch: Watch, options: Options, figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``streams``, ``coverage``, ``accuracy`` and ``kinds`` of shift by model and version, and what
    each rests on (``assumes``). ``options`` are those of the watch; ``figures``: see
    `service.monitor.window.windowed`.

    ``coverage`` has of each level the labels of all time with the anytime-valid bounds, of the
    window its coverage and the ``least`` that a healthy bundle's alert allows, and what the bundle
    promised; ``accuracy`` has of a classifier's window the accuracy, the expected accuracy of all
    served rows and its ``bias`` on labelled ones. ``least`` and ``promised`` need the bundle.
    """
    return {
        "streams": [
            {"model": model, "version": version, "stream": name, **_stream(stream)}
            for (model, version), streams in watch.streams.items()
            for name, stream in streams.items()
        ],
        "coverage": _coverage(watch, figures),
        "accuracy": [
            _accuracy(figure, watch.promises.get((figure["model"], figure["version"])))
            for figure in figures
            if figure["task"] == "classification" and figure.get("bins")
        ],
        "kinds": [
            {"model": model, "version": version, **_shift(found)}
            for (model, version), kinds in watch.kinds.items()
            if (found := statement(kinds, options)) is not None
        ],
        "assumes": ASSUMES,
    }


def _stream(stream: Stream) -> dict[str, Any]:
    distances, bet = stream.distances(), stream.martingale
    return {
        "reference": len(stream.gathered) if stream.learning else sum(stream.reference),
        "learning": stream.learning,
        "seen": 0 if bet is None else bet.seen,
        "log10_martingale": None if bet is None else bet.log10_capital,
        "changes": stream.changes,
        "ks": distances.get("ks"),
        "psi": distances.get("psi"),
    }


def _shift(found: Shift) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(found).items()
    }


def _coverage(watch: Watch, figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_key = {(f["model"], f["version"]): f.get("coverage", {}) for f in figures}
    found = []
    for key, levels in watch.coverage.items():
        promises = watch.promises.get(key, Promises(""))
        for level, one in levels.items():
            lower, upper = one.bounds(ERROR)
            found.append(
                {
                    "model": key[0],
                    "version": key[1],
                    "level": level,
                    "labelled": one.n,
                    "covered": one.covered,
                    "lower": lower,
                    "upper": upper,
                    "window": _window(
                        level, by_key.get(key, {}).get(level), promises.conformal_rows.get(level)
                    ),
                    "promised": _promised(promises.levels.get(level)),
                }
            )
    return found


def _window(level: str, found: Mapping[str, Any] | None, rows: int | None) -> dict[str, Any] | None:
    if not found or not found["labelled"]:
        return None
    n = found["labelled"]
    least = None if rows is None else coverage_threshold(float(level), n, rows)
    return {"labelled": n, "coverage": found["coverage"], "least": least}


def _accuracy(figure: Mapping[str, Any], promises: Promises | None) -> dict[str, Any]:
    bias = bounds_of(figure)
    return {
        **{name: figure[name] for name in ("model", "version", "served", "labelled")},
        "accuracy": figure["accuracy"],
        "expected": figure["expected_accuracy"],
        "bias": {**bias, "share": figure["stratified_share"]} if bias else None,
        "promised": None if promises is None else _promised(promises.accuracy),
    }


def _promised(one: RiskMonitor | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "floor": one.floor,
        "labelled": one.n,
        "held": one.covered,
        "log10_evidence": one.log10_evidence,
        "alarm": one.alarm,
    }
