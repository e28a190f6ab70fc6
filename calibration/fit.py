"""``hedged fit``: a frozen model and a data set in, a verified bundle out.

open the model → cache (features, outputs, labels) in one pass → four disjoint splits by hash →
fit the head → measure it on the test rows → compile, check, write.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.assemble import USES, Dataset, assemble
from calibration.bundle import Bundle, SplitRecord
from calibration.fit_head import FitOptions, Fitted, Parts, check_options, fit_head, run_head
from calibration.quality import summary
from calibration.sampling import Sampling, linearised, sampled_model
from posthoc import logits
from posthoc.contract import Array, DataError, Features, FitError, LinearHead, State
from posthoc.data import TableMapping, open_table, split_roles, to_rows
from posthoc.features import Cache, build_cache, default_cache_dir
from posthoc.frozen import Frozen, expose
from posthoc.laplace_torch import Sampled
from posthoc.methods.laplace.importing import import_laplace
from posthoc.model.probe import difference
from posthoc.model.samples import Samples
from posthoc.opening import Source, open_model
from posthoc.rows import BLOCK, Rows
from posthoc.runtime import open_session

Progress = Callable[[str, int, int], None]
DEFAULT_SPLIT = {"module": 0.3, "calibration": 0.2, "conformal": 0.25, "test": 0.25}
ROLES = tuple(DEFAULT_SPLIT)
GOLDEN_ROWS = 8
CHECK_ROWS = 64
BATCH_EFFECT = 0.1  # relative to the largest output; as much as a model is opened with
READ_ROWS = 1024
LINEARISED_ROWS = 500


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the table are what, as the user says it; None: found or absent."""

    target: str | Sequence[str] | None = None
    inputs: Mapping[str, Sequence[str]] | None = None
    split_by: str | None = None
    id: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """A frozen model and its cached rows as logits (or means), ready for any number of fits."""

    frozen: Frozen
    linear: LinearHead | None
    link: logits.Link
    mapping: TableMapping
    classes: tuple[str, ...] | None
    cache: Cache
    usable: Array  # rows without a fault
    sampled: Sampled | None = None
    train: Rows | None = None  # that the network was trained on
    overlap: int = 0  # usable rows that are among them, by content

    def features(self, rows: Array) -> Features:
        """The cached rows, outputs as logits."""
        taken = self.cache.take(rows)
        return Features(taken.phi, logits.to_logits(taken.z, self.link), taken.y)


def link_of(frozen: Frozen) -> logits.Link:
    """How the frozen tensor becomes logits: see `posthoc.logits.Link`."""
    if frozen.z_is_probs:
        return "log_sigmoid" if frozen.z_dim == 1 else "log"
    # One logit is that of the second of two classes, whether or not the model applies the sigmoid.
    return "sigmoid" if frozen.z_dim == 1 else "identity"


def prepare(
    model: str | Path,
    data: str | Path,
    *,
    options: FitOptions,
    columns: Columns | None = None,
    cache_dir: Path | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    threads: int = 0,
    max_cache_bytes: int | None = None,
    progress: Progress | None = None,
    sampling: Sampling | None = None,
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
    train_data: str | Path | None = None,
    **source: Any,
) -> Material:
    """Open the model and cache its features over the data, in one resumable pass.

    With ``sampling`` the weights of a torch model are sampled first, on the rows that ``fractions``
    and the seed of ``options`` make module rows, and the features are the copies' outputs.

    ``train_data`` are rows that the network was trained on, in columns of the same names: the
    curvature may come from them, and nothing else.

    ``source`` are the further fields of `posthoc.opening.Source`: checkpoint, preprocess, example,
    trust_pickle, output, head.
    """
    columns = columns or Columns()
    if columns.classes is not None and options.task == "regression":
        raise DataError("--classes names the classes of a classifier; this is a regression")
    samples = Samples(
        data, columns.target, columns.inputs, split_by=columns.split_by, id=columns.id
    )
    given = Source(model, **source)
    frozen = open_model(given, task=options.task, samples=samples)
    sampled = None
    if sampling is not None:
        frozen, sampled = sampled_model(
            given,
            frozen,
            samples,
            sampling,
            task=options.task,
            classes=columns.classes,
            fractions=fractions,
            seed=options.seed,
        )
    table, mapping = samples.table, samples.mapping(frozen.inputs)
    if not mapping.target:
        raise DataError("a fit needs labels: name their column with --target")
    link: logits.Link = "identity" if options.task == "regression" else link_of(frozen)
    width = 2 if frozen.z_dim == 1 and options.task == "classification" else frozen.z_dim
    if columns.classes is not None and len(columns.classes) != width:
        raise DataError(
            f"--classes names {len(columns.classes)} classes and the model has {width} outputs"
        )
    how: dict[str, Any] = {
        "cache_dir": cache_dir or default_cache_dir(),
        "batch_size": batch_size,
        "device": device,
        "threads": threads,
        "max_bytes": max_cache_bytes,
    }
    if progress is not None:
        how["progress"] = lambda done, total: progress("cache", done, total)
    cache = build_cache(frozen, table, mapping, task=options.task, classes=columns.classes, **how)
    usable = np.setdiff1d(np.arange(cache.n_rows), np.fromiter(cache.bad, np.int64))
    if len(usable) == 0:
        row, fault = min(cache.bad.items())
        raise DataError(f"{data}: every row is faulty, the first because row {row}: {fault}")
    if link in ("log", "log_sigmoid") and not _are_probabilities(cache.z[usable]):
        # The few rows that opened the model looked like probabilities; all of them do not.
        link = "identity" if link == "log" else "sigmoid"
    linear = frozen.head
    if linear is not None and link == "sigmoid":
        linear = logits.two_class_head(linear)
    material = Material(frozen, linear, link, mapping, columns.classes, cache, usable, sampled)
    if train_data is None:
        return material
    inputs = mapping.inputs_only()
    seen = build_cache(frozen, open_table(train_data), inputs, task=options.task, **how)
    good = np.setdiff1d(np.arange(seen.n_rows), np.fromiter(seen.bad, np.int64))
    blocks = [good[i : i + BLOCK] for i in range(0, len(good), BLOCK)]
    other = dataclasses.replace(material, cache=seen)
    return dataclasses.replace(
        material,
        train=Rows(lambda: map(other.features, blocks), len(good)),
        overlap=int(np.isin(cache.content_hashes[usable], seen.content_hashes[good]).sum()),
    )


def _are_probabilities(z: Array) -> bool:
    """Whether every cached row is a probability vector (one column: the second class's)."""
    inside = bool((z >= 0).all() and (z <= 1 + 1e-3).all())
    return inside and (z.shape[1] == 1 or bool(np.allclose(z.sum(1), 1, atol=1e-3)))


def split(material: Material, seed: int, fractions: Mapping[str, float] = DEFAULT_SPLIT) -> Array:
    """Role index (into ROLES) of every usable row: a hash of its split key and the seed."""
    return split_roles(material.cache.split_keys[material.usable], fractions, seed)


def parts_of(material: Material, roles: Array) -> tuple[Parts, Features]:
    """The three parts a fit may see, and the test rows.

    Rows that share a split key are no independent evidence. A rank counts items, so of each key
    one row, chosen by hash, stands in the conformal part: coverage then holds for a random row of
    a new item (Dunn, Wasserman & Ramdas 2022, "Distribution-free prediction sets for two-layer
    hierarchical models", subsampling once).
    """
    taken = [material.usable[roles == i] for i in range(len(ROLES))]
    if material.mapping.split_by is not None:
        taken[2] = one_per_key(material.cache, taken[2])
    module, calibration, conformal, test = (material.features(rows) for rows in taken)
    return Parts(module, calibration, conformal), test


def one_per_key(cache: Cache, rows: Array) -> Array:
    """Of ``rows``, the one with the smallest content hash for each split key, in order."""
    order = np.lexsort((cache.content_hashes[rows], cache.split_keys[rows]))
    _, first = np.unique(cache.split_keys[rows][order], return_index=True)
    return np.sort(rows[order][first])


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
    laplace: str | Path | None = None,
    sampling: Sampling | None = None,
    **how: Any,
) -> Bundle:
    """Fit and write a bundle at ``out``. ``how`` goes to `prepare`.

    ``laplace`` is a posterior fitted with laplace-torch for the same head, which takes the place of
    the method: see `posthoc.methods.laplace.importing`. ``sampling`` asks for sampled weights and
    goes with the method ``weights``.

    Raises a HedgedError that names the object and the fix for anything that the model, the data
    or the rows cannot give.
    """
    out = Path(out)
    if out.exists():
        raise FitError(f"{out} exists already; a bundle is immutable, give another -o")
    if (sampling is not None) != (options.method == "weights"):
        raise FitError("the method weights and --weights all|subnetwork go together")
    check_options(options)
    if laplace is not None and (options.method != "laplace" or options.settings):
        raise FitError(
            "an imported posterior stands in place of --method and has its own settings; "
            "leave --method and --set out"
        )
    if how.get("train_data") is not None and (laplace is not None or options.method == "none"):
        raise FitError("--train-data is for a module that is fitted here; leave it out")
    material = prepare(
        model,
        data,
        options=options,
        progress=progress,
        sampling=sampling,
        fractions=fractions,
        **how,
    )
    posterior = None if laplace is None else _imported(laplace, material, options)
    fitted, test, roles = fit_material(material, options, fractions, posterior)
    return write(material, fitted, test, roles, out, options, data, name=name, version=version)


def _imported(path: str | Path, material: Material, options: FitOptions) -> tuple[str, State]:
    if material.linear is None:
        raise FitError(f"{path} is a last-layer posterior, and no linear head was found")
    if not Path(path).is_file():
        raise FitError(f"{path}: no such file")
    return import_laplace(path, material.linear, options.task)


def fit_material(
    material: Material,
    options: FitOptions,
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
    posterior: tuple[str, State] | None = None,
) -> tuple[Fitted, Features, Array]:
    """(fitted head, test rows, role of every usable row) for the seed in ``options``."""
    roles = split(material, options.seed, fractions)
    parts, test = parts_of(material, roles)
    return fit_head(material.linear, parts, options, posterior, material.train), test, roles


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
    counts = Counter(ROLES[i] for i in roles)
    raw = _raw_rows(material, data, chosen)
    dataset = Dataset(
        mapping=material.mapping,
        classes=material.classes,
        split=SplitRecord(
            seed=options.seed,
            by=material.mapping.split_by,
            rows={r: counts[r] for r in ROLES},
            items=_items(material, roles),
            uses=USES,
        ),
        link=material.link,
        rows=raw,
        golden=GOLDEN_ROWS,
        features=_asked_again(material, raw, chosen),
        roles=np.asarray([ROLES[i] for i in roles]),
        hashes=material.cache.content_hashes[material.usable],
        keys=material.cache.split_keys[material.usable],
        reference=_reference(material, fitted, roles),
        summary={
            "rows": int(material.cache.n_rows),
            "bad_rows": len(material.cache.bad),
            "link": material.link,
            "sources": dict(material.frozen.sources),
            "rows_among_training_rows": material.overlap,
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
        evaluation=summary(fitted, test) | _beside(material, data, roles),
    )


def _beside(material: Material, data: str | Path, roles: Array) -> dict[str, Any]:
    """laplace-torch's linearised predictive on some test rows, where weights were sampled."""
    if material.sampled is None:
        return {}
    rows = material.usable[roles == ROLES.index("test")][:LINEARISED_ROWS]
    (x,) = _raw_rows(material, data, rows).values()
    y = material.features(rows).y
    assert y is not None
    return {"linearised": linearised(material.sampled, x, y)}


def _raw_rows(material: Material, data: str | Path, rows: Array) -> dict[str, Array]:
    """The inputs of a few rows (ascending), read from the table again."""
    wanted = [c for cs in material.mapping.inputs.values() for c in cs]
    mapping = material.mapping.inputs_only()
    found: dict[str, list[Array]] = {s.name: [] for s in material.frozen.inputs}
    start = 0
    for batch in open_table(data).batches(READ_ROWS, wanted):
        inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
        if len(inside):
            got = to_rows(batch, mapping, material.frozen.inputs, hashed=False)
            for key in found:
                found[key].append(got.inputs[key][inside])
        start += batch.num_rows
        if start > rows[-1]:
            break
    return {k: np.concatenate(v) for k, v in found.items()}


def _asked_again(material: Material, raw: Mapping[str, Array], rows: Array) -> Features:
    """φ and z of a few rows in one batch. The cache has them from other batches, where kernels
    round differently and dynamic quantisation moves them by per cents; FitError beyond that."""
    frozen = material.frozen
    names = [n for n in (frozen.z, frozen.phi) if n is not None]
    values = open_session(expose(frozen)).run(names, dict(raw))
    z, phi = values[0], values[1] if frozen.phi is not None else None
    if difference(z, material.cache.z[rows]) > BATCH_EFFECT:
        raise FitError(
            "the cached outputs are not the fused graph's on the same rows: the cache is another "
            "model's or table's; remove it and fit again"
        )
    return Features(phi, logits.to_logits(z, material.link))


def _items(material: Material, roles: Array) -> dict[str, int] | None:
    """Distinct split keys of each role; None where rows are the items."""
    if material.mapping.split_by is None:
        return None
    keys = material.cache.split_keys[material.usable]
    return {r: len(np.unique(keys[roles == i])) for i, r in enumerate(ROLES)}


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
