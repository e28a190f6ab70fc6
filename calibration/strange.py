"""Rows beside the user's own: strange ones, corrupted copies, and labelled ones from elsewhere.

Of the user's rows half, by the hash of their content, choose a score; the others are kept for the
chosen one. A corrupted copy remembers the row that it was made of, so that no score meets the copy
of a row that it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.corruption import CORRUPTIONS, corrupt, kind_of
from calibration.corruption import measure as measure_inputs
from calibration.material import Material, raw_rows
from posthoc import logits
from posthoc import rows as blocks_of
from posthoc.contract import I64, Array, DataError, Features, Task
from posthoc.data import open_table, split_roles
from posthoc.features import build_cache
from posthoc.frozen import expose
from posthoc.runtime import open_session

COPIES = 1000  # of the user's rows, evenly taken: the network runs on each again, a kind a time
SEVERITY = 3  # of 5, the middle
BATCH = 64  # rows that the network runs on at once
CORRUPTED, SHIFTED = "corrupted", "labelled"
HALVES = {"choose": 0.5, "locked": 0.5}
_SALT = 20_011  # of the halves: no seed of a split


@dataclass(frozen=True, slots=True)
class Strange:
    """Strange rows, what they are and what kind of them; ``source`` holds the places in the cache
    of the rows that they were made of, None of rows from elsewhere. Corrupted rows keep their
    labels; rows SHIFTED are labelled ones from elsewhere, which no score is asked to tell apart."""

    name: str
    kind: str
    about: str
    rows: Features
    source: I64 | None = None
    hashes: Array | None = None  # of the rows' content

    def beside(self, tested: I64) -> Features:
        """Those that may stand beside the test rows ``tested``."""
        if self.source is None:
            return self.rows
        return blocks_of.take(self.rows, np.isin(self.source, tested))


def given_sets(
    material: Material, paths: Mapping[str, str | Path], task: Task, how: Mapping[str, Any]
) -> tuple[list[Strange], int]:
    """(the user's sets; rows that the model was run on). ``how`` is what `prepare` was told."""
    found, run = [], 0
    for name, path in paths.items():
        table = open_table(path)
        mapping = material.mapping.inputs_only()
        cache = build_cache(material.frozen, table, mapping, task=task, **_told(how, name))
        run += table.n_rows
        if len(fine := cache.usable) == 0:
            raise DataError(f"{path}: every row is faulty")
        taken = cache.take(fine)
        rows = Features(taken.phi, logits.to_logits(taken.z, material.link))
        found.append(Strange(name, name, str(path), rows, None, cache.content_hashes[fine]))
    return found, run


def labelled_sets(
    material: Material, paths: Mapping[str, str | Path], task: Task, how: Mapping[str, Any]
) -> tuple[list[Strange], int]:
    """(further labelled sets, in the columns of the first; rows that the model was run on). Rows
    that are among the first set's, by content or as a sibling of one, are left out. ``how`` is what
    `prepare` was told."""
    found, run = [], 0
    for name, path in paths.items():
        table = open_table(path)
        classes = material.classes
        cache = build_cache(
            material.frozen,
            table,
            material.mapping,
            task=task,
            classes=classes,
            **_told(how, name),
        )
        run += table.n_rows
        if cache.y is None:
            raise DataError(f"{path}: no labels; give unlabelled strange rows as --ood-data")
        fine = cache.usable
        mine = np.isin(cache.content_hashes[fine], material.cache.content_hashes)
        mine |= np.isin(cache.split_keys[fine], material.cache.split_keys)
        fresh = fine[~mine]
        if len(fresh) == 0:
            raise DataError(f"{path}: every row is faulty, or among the rows of the first --data")
        taken = cache.take(fresh)
        rows = Features(taken.phi, logits.to_logits(taken.z, material.link), taken.y)
        found.append(Strange(name, SHIFTED, f"{len(fresh)} labelled rows of {path}", rows))
    return found, run


def halved(given: Sequence[Strange]) -> tuple[list[Strange], dict[str, Features]]:
    """(the half of each set that chooses; the half that is kept for what was chosen)."""
    chosen, kept = [], {}
    for s in given:
        assert s.hashes is not None
        half = split_roles(s.hashes, HALVES, _SALT)
        parts = [blocks_of.take(s.rows, half == i) for i in range(len(HALVES))]
        if min(map(len, parts)) == 0:
            raise DataError(f"{s.about}: {len(s.rows)} rows are too few, or too alike, to halve")
        chosen.append(replace(s, about=f"half of {s.about}", rows=parts[0]))
        kept[s.name] = parts[1]
    return chosen, kept


def corrupted_sets(
    material: Material,
    data: str | Path,
    names: Sequence[str] | None,
    *,
    severity: int = SEVERITY,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Strange], int]:
    """(usable rows, evenly taken, with each corruption; rows that the model was run on).

    ``names`` None: every corruption of the kind of the model's inputs. Raises DataError for a name
    that is none of them, and for inputs that no corruption fits.
    """
    if material.frozen.dense is not None:
        raise DataError("--corrupt is for models that answer one value a row, not for maps")
    kind = kind_of({s.name: s for s in material.frozen.inputs})
    known = CORRUPTIONS[kind]
    for name in names or ():
        if name not in known:
            raise DataError(f"no corruption of {kind} is called {name!r}: {', '.join(known)}")
    step = -(-len(material.usable) // COPIES)
    source = np.asarray(material.usable[::step], np.int64)
    raw = raw_rows(material, data, source)
    measured = measure_inputs(raw, kind)
    session = open_session(expose(material.frozen))
    labels = material.features(source).y
    wanted = list(names or known)
    made = []
    for i, name in enumerate(wanted):
        inputs = dict(corrupt(raw, name, severity, measured, keys=source, seed=seed))
        made.append(
            Strange(
                f"{name} {severity}",
                CORRUPTED,
                f"{len(source)} of your rows: {known[name].summary}, severity {severity} of 5",
                replace(_run(material, session, inputs), y=labels),
                source,
            )
        )
        if progress is not None:
            progress(i + 1, len(wanted))
    return made, len(wanted) * len(source)


def _told(how: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of what `prepare` was told, that which a further cache is told too."""
    renamed = {"max_cache_bytes": "max_bytes"}
    keys = ("cache_dir", "device", "threads", "batch_size", "pixels", "max_cache_bytes", "mapper")
    found = {renamed.get(k, k): how[k] for k in keys if how.get(k) is not None}
    if (progress := how.get("progress")) is not None:
        found["progress"] = lambda done, total: progress(name, done, total)
    return found


def _run(material: Material, session: Any, inputs: Mapping[str, Array]) -> Features:
    frozen = material.frozen
    names = [n for n in (frozen.z, frozen.phi) if n is not None]
    n = len(next(iter(inputs.values())))
    parts = [
        session.run(names, {k: v[i : i + BATCH] for k, v in inputs.items()})
        for i in range(0, n, BATCH)
    ]
    values = [np.concatenate(v) for v in zip(*parts, strict=True)]
    phi = values[1] if frozen.phi is not None else None
    return Features(phi, logits.to_logits(values[0], material.link))
