"""A watch on disk: one JSON file, whole or not at all, and held by one monitor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from calibration.drift import risk_monitor, samples
from posthoc.contract import DataError
from service.lock import locked
from service.monitor import kinds, promises
from service.monitor.fields import Key
from service.monitor.following import Cursor
from service.monitor.stream import Options, from_json, to_json
from service.monitor.watch import Watch

_FORMAT = 2
_READ = (1, 2)  # of 1 there are no promises and no kinds
T = TypeVar("T")


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Keep other monitors from a file, by a file beside it that ends in ``.lock`` and stays.

    Raises DataError where another has it, or where nothing can be written.
    """
    beside = file.with_name(f"{file.name}.lock")  # the file itself is another one at every save
    other = DataError(
        f"{file}: another hedged monitor keeps its evidence there; read its metrics, end it, or "
        "give another --state"
    )
    try:
        with locked(beside, other, make=True):
            yield
    except OSError as e:
        if e.filename != str(beside):
            raise
        raise DataError(f"{beside} cannot be written ({e.strerror}); give another --state") from e


def save(watch: Watch, options: Options, file: Path) -> None:
    """Write the watch to a file, whole or not at all."""
    keys = dict.fromkeys((*watch.streams, *watch.coverage, *watch.promises))
    text = json.dumps(
        {
            "format": _FORMAT,
            "options": asdict(options),
            "cursor": asdict(watch.cursor),
            "models": [{"model": k[0], "version": k[1], **_model(watch, k)} for k in keys],
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
    """The watch of a file; a new one where there is none. Files of format 1, from before promises
    and kinds of shift, are read too.

    Raises DataError for a file that is no such watch, or was made with other options: evidence
    that was gathered in another way cannot be gone on with.
    """
    if not file.exists():
        return Watch()
    try:
        saved = json.loads(file.read_text())
        if saved["format"] not in _READ:
            raise DataError(f"{file}: format {saved['format']}, and this hedged knows {_READ}")
        if saved["options"] != asdict(options):
            raise DataError(
                f"{file} was made with {saved['options']}, not {asdict(options)}: use these "
                "options again, or another --state"
            )
        return _watch(saved["cursor"], {(m["model"], m["version"]): m for m in saved["models"]})
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"{file} is no saved monitor ({e!r}); delete it to begin again") from e


def _model(watch: Watch, key: Key) -> dict[str, Any]:
    """What is kept of one model and version; null for what there is not."""
    coverage = watch.coverage.get(key, {})
    return {
        "rows": watch.rows.get(key, 0),
        "latest": watch.latest.get(key, 0.0),
        "streams": {name: to_json(stream) for name, stream in watch.streams.get(key, {}).items()},
        "samples": _made(watch.samples.get(key), samples.to_json),
        "kinds": _made(watch.kinds.get(key), kinds.to_json),
        "coverage": {level: risk_monitor.to_json(one) for level, one in coverage.items()},
        "promises": _made(watch.promises.get(key), promises.to_json),
    }


def _watch(cursor: Mapping[str, Any], models: Mapping[Key, Mapping[str, Any]]) -> Watch:
    return Watch(
        cursor=Cursor(**cursor),
        streams={
            key: {name: from_json(s) for name, s in m["streams"].items()}
            for key, m in models.items()
        },
        coverage={
            key: {level: risk_monitor.from_json(s) for level, s in m["coverage"].items()}
            for key, m in models.items()
        },
        promises=_kept(models, "promises", promises.from_json),
        samples=_kept(models, "samples", samples.from_json),
        kinds=_kept(models, "kinds", kinds.from_json),
        rows={key: m["rows"] for key, m in models.items()},
        latest={key: m["latest"] for key, m in models.items()},
    )


def _made(value: T | None, to_json: Callable[[T], Any]) -> Any:
    return None if value is None else to_json(value)


def _kept(
    models: Mapping[Key, Mapping[str, Any]], name: str, from_json: Callable[[Any], T]
) -> dict[Key, T]:
    """One thing of each model that has it."""
    found = {key: m.get(name) for key, m in models.items()}
    return {key: from_json(one) for key, one in found.items() if one is not None}
