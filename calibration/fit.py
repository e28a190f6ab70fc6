"""``hedged fit``: a frozen model and a data set in, a verified bundle out.

open the model → cache (features, outputs, labels) in one pass → four disjoint splits by hash →
fit the head → measure it on the test rows → compile, check, write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.assemble import USES, Dataset, assemble
from calibration.bundle import Bundle, SplitRecord
from calibration.fit_head import FitOptions, Fitted, Parts, fit_head, run_head
from calibration.quality import summary
from posthoc import links
from posthoc.contract import Array, DataError, Features, FitError, LinearHead
from posthoc.data import TableMapping, infer_mapping, open_table, split_roles, to_rows
from posthoc.features import Cache, build_cache, default_cache_dir
from posthoc.frozen import Frozen, open_frozen

Progress = Callable[[str, int, int], None]
DEFAULT_SPLIT = {"module": 0.3, "calibration": 0.2, "conformal": 0.25, "test": 0.25}
ROLES = tuple(DEFAULT_SPLIT)
GOLDEN_ROWS = 8
CHECK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the table are what, as the user says it; None: found or absent."""

    target: str | Sequence[str] | None = None
    inputs: Mapping[str, Sequence[str]] | None = None
    group: str | None = None
    split_by: str | None = None
    id: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """A frozen model and its cached rows as logits (or means), ready for any number of fits."""

    frozen: Frozen
    linear: LinearHead | None
    link: links.Link
    mapping: TableMapping
    classes: tuple[str, ...] | None
    cache: Cache
    usable: Array  # rows without a fault

    def features(self, rows: Array) -> Features:
        """The cached rows, outputs as logits."""
        taken = self.cache.take(rows)
        return Features(taken.phi, links.to_logits(taken.z, self.link), taken.y)


def link_of(frozen: Frozen) -> links.Link:
    """How the frozen tensor becomes logits: see `posthoc.links.Link`."""
    if frozen.z_is_probs:
        return "log_sigmoid" if frozen.z_dim == 1 else "log"
    return "sigmoid" if "Sigmoid" in frozen.tail and frozen.z_dim == 1 else "identity"


def prepare(
    model: str | Path,
    data: str | Path,
    *,
    options: FitOptions,
    columns: Columns | None = None,
    cache_dir: Path | None = None,
    output: str | None = None,
    head: str | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    threads: int = 0,
    max_cache_bytes: int | None = None,
    progress: Progress | None = None,
) -> Material:
    """Open the model and cache its features over the data, in one resumable pass."""
    columns = columns or Columns()
    frozen = open_frozen(model, task=options.task, output=output, head=head)
    table = open_table(data)
    mapping = infer_mapping(
        table.columns,
        frozen.inputs,
        target=columns.target,
        inputs=columns.inputs,
        group=columns.group,
        split_by=columns.split_by,
        id=columns.id,
    )
    if not mapping.target:
        raise DataError("a fit needs labels: name their column with --target")
    link: links.Link = "identity" if options.task == "regression" else link_of(frozen)
    cache = build_cache(
        frozen,
        table,
        mapping,
        task=options.task,
        classes=columns.classes,
        cache_dir=cache_dir or default_cache_dir(),
        batch_size=batch_size,
        device=device,
        threads=threads,
        max_bytes=max_cache_bytes,
        progress=None if progress is None else lambda done, total: progress("cache", done, total),
    )
    usable = np.setdiff1d(np.arange(cache.n_rows), np.fromiter(cache.bad, np.int64))
    linear = frozen.head
    if linear is not None and link == "sigmoid":
        linear = links.two_class_head(linear)
    width = 2 if link in ("sigmoid", "log_sigmoid") else frozen.z_dim
    if columns.classes is not None and len(columns.classes) != width:
        raise DataError(
            f"--classes names {len(columns.classes)} classes and the model has {width} outputs"
        )
    return Material(frozen, linear, link, mapping, columns.classes, cache, usable)


def split(material: Material, seed: int, fractions: Mapping[str, float] = DEFAULT_SPLIT) -> Array:
    """Role index (into ROLES) of every usable row: a hash of its split key and the seed."""
    return split_roles(material.cache.split_keys[material.usable], fractions, seed)


def parts_of(material: Material, roles: Array) -> tuple[Parts, Features]:
    """The three parts a fit may see, and the test rows."""
    taken = [material.features(material.usable[roles == i]) for i in range(len(ROLES))]
    return Parts(*taken[:3]), taken[3]


def fit(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    options: FitOptions,
    *,
    name: str | None = None,
    version: str = "1",
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
    progress: Progress | None = None,
    **how: Any,
) -> Bundle:
    """Fit and write a bundle at ``out``. ``how`` goes to `prepare`.

    Raises a HedgedError that names the object and the fix for anything that the model, the data
    or the rows cannot give.
    """
    out = Path(out)
    if out.exists():
        raise FitError(f"{out} exists already; a bundle is immutable, give another -o")
    material = prepare(model, data, options=options, progress=progress, **how)
    fitted, test, roles = fit_material(material, options, fractions)
    return write(material, fitted, test, roles, out, options, data, name=name, version=version)


def fit_material(
    material: Material, options: FitOptions, fractions: Mapping[str, float] = DEFAULT_SPLIT
) -> tuple[Fitted, Features, Array]:
    """(fitted head, test rows, role of every usable row) for the seed in ``options``."""
    roles = split(material, options.seed, fractions)
    parts, test = parts_of(material, roles)
    return fit_head(material.linear, parts, options), test, roles


def write(
    material: Material,
    fitted: Fitted,
    test: Features,
    roles: Array,
    out: Path,
    options: FitOptions,
    data: str | Path,
    *,
    name: str | None = None,
    version: str = "1",
) -> Bundle:
    """Measure the head on the test rows, compile it behind the model and write the bundle."""
    chosen = material.usable[roles == ROLES.index("test")][:CHECK_ROWS]
    if len(chosen) == 0:
        raise FitError("no test rows: give more data or another --split")
    rows = _raw_rows(material, data, chosen[:GOLDEN_ROWS])
    counts = Counter(ROLES[i] for i in roles)
    dataset = Dataset(
        mapping=material.mapping,
        classes=material.classes,
        split=SplitRecord(
            seed=options.seed,
            by=material.mapping.split_by,
            rows={r: counts[r] for r in ROLES},
            uses=USES,
        ),
        link=material.link,
        rows=rows,
        features=material.features(chosen[:GOLDEN_ROWS]),
        roles=np.asarray([ROLES[i] for i in roles]),
        hashes=material.cache.content_hashes[material.usable],
        reference=_reference(material, fitted, roles),
        summary={
            "rows": int(material.cache.n_rows),
            "bad_rows": len(material.cache.bad),
            "link": material.link,
        },
    )
    return assemble(
        out,
        material.frozen,
        fitted,
        dataset,
        options,
        name=name or Path(material.frozen.file).stem,
        version=version,
        evaluation=summary(fitted, test),
    )


def _raw_rows(material: Material, data: str | Path, rows: Array) -> dict[str, Array]:
    """The inputs of a few rows, read from the table again."""
    wanted = [c for cs in material.mapping.inputs.values() for c in cs]
    table = open_table(data)
    found: dict[str, list[Array]] = {s.name: [] for s in material.frozen.inputs}
    for row in rows:
        batch = next(iter(table.batches(1, wanted, start=int(row))))
        got = to_rows(batch, material.mapping.model_copy(update=_NO_META), material.frozen.inputs)
        for key in found:
            found[key].append(got.inputs[key])
    return {k: np.concatenate(v) for k, v in found.items()}


_NO_META: dict[str, Any] = {"target": (), "group": None, "split_by": None, "id": None}


def _reference(material: Material, fitted: Fitted, roles: Array) -> dict[str, Array]:
    """What live traffic is held against: confidence, entropy and OOD score of conformal rows."""
    mask = roles == ROLES.index("conformal")
    made = run_head(fitted.head, material.features(material.usable[mask]))
    out: dict[str, Array] = {}
    for key in ("confidence", "entropy", "ood_score", "ood_pvalue", "set_size"):
        if key in made:
            column = np.full(len(roles), np.nan)
            column[mask] = made[key]
            out[key] = column
    return out
