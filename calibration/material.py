"""A frozen model with its cached rows, and which of them do what.

open the model → cache (features, outputs, labels) in one pass → four disjoint splits by hash.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.conformal.randomise import uniforms
from calibration.families.family import BINARY
from calibration.fit_options import FitOptions, Parts
from calibration.network import at_network, attached_model, kept
from calibration.sampling import Sampling, sampled_model
from posthoc import logits
from posthoc.contract import F64, Array, DataError, Features, FitError, LinearHead
from posthoc.data import TableMapping, open_table, split_roles, to_rows
from posthoc.features import Cache, build_cache, default_cache_dir
from posthoc.folds import Mapper
from posthoc.frozen import Frozen
from posthoc.laplace_torch import Sampled
from posthoc.model.samples import Samples
from posthoc.network.attach import Attached
from posthoc.opening import Source, open_model
from posthoc.pixels import PER_IMAGE
from posthoc.rows import Rows

if TYPE_CHECKING:
    from calibration.strange import Strange

Progress = Callable[[str, int, int], None]
DEFAULT_SPLIT = {"module": 0.3, "calibration": 0.2, "conformal": 0.25, "test": 0.25}
ROLES = tuple(DEFAULT_SPLIT)
READ_ROWS, READ_IMAGES = 1024, 16
LEAST_USABLE = 0.5  # share of rows; with fewer the table is not what its reader thinks
MOST_PRODUCTION = 20_000  # rows that a shift is learnt from, evenly taken


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the table are what, as the user says it; None: found or absent."""

    target: str | Sequence[str] | None = None
    inputs: Mapping[str, Sequence[str]] | None = None
    split_by: str | None = None
    group: str | None = None
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
    usable: Array  # rows without a fault; of a dense model the drawn pixels, image by image
    sampled: Sampled | None = None
    attached: Attached | None = None
    train: Rows | None = None  # that the network was trained on
    overlap: int = 0  # usable rows that are among them, by content
    production: Features | None = None  # rows without labels, of what is to come
    strange: tuple[Strange, ...] = ()  # that a score is to tell apart

    @property
    def per(self) -> int:
        """Rows of one item: 1, or the pixels drawn from an image."""
        return self.cache.per

    def features(self, rows: Array) -> Features:
        """The cached rows, outputs as logits."""
        taken = self.cache.take(rows)
        return Features(taken.phi, logits.to_logits(taken.z, self.link), taken.y)

    def shared(self, rows: Array) -> Rows:
        """The same, read block by block in whatever process a share of them is sent to."""
        return self.cache.shared(rows, self.link)


def link_of(frozen: Frozen) -> logits.Link:
    """How the frozen tensor becomes logits: see `posthoc.logits.Link`."""
    if frozen.z_is_probs:
        return "log_sigmoid" if frozen.z_dim == 1 else "log"
    # One logit is that of the second of two classes, whether or not the model applies the sigmoid.
    return "sigmoid" if frozen.z_dim == 1 else "identity"


def prepare(
    model: str | Path | None,
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
    production: str | Path | None = None,
    pixels: int | None = None,
    mapper: Mapper | None = None,
    **source: Any,
) -> Material:
    """Open the model and cache its features over the data, in one resumable pass.

    A network-level method of ``options`` is fitted here, on the rows that ``fractions`` and the
    seed make module rows, and the features are the outputs of its samples. With ``sampling`` the
    weights of a torch model are sampled likewise.

    Without a ``model`` the inputs of ``columns`` are what it answered: `posthoc.model.answers`.

    Of a dense model ``pixels`` pixels (default 256) are drawn from each image.

    ``train_data`` are rows that the network was trained on, in columns of the same names: the
    curvature may come from them, and nothing else.

    ``production`` are rows without labels that a shift is learnt from.

    With a ``mapper`` its workers make the caches: see `posthoc.features.build_cache`.

    ``source`` are the further fields of `posthoc.opening.Source`: checkpoint, preprocess, example,
    trust_pickle, output, head.
    """
    columns = columns or Columns()
    if columns.classes is not None and options.task == "regression":
        raise DataError("--classes names the classes of a classifier; this is a regression")
    samples = Samples(
        data,
        columns.target,
        columns.inputs,
        group=columns.group,
        split_by=columns.split_by,
        id=columns.id,
    )
    given = Source(model, **source)
    frozen = open_model(given, task=options.task, samples=samples, keep=kept(options))
    _check_model(frozen, options, pixels)
    sampled = attached = None
    if at_network(options.method):
        attached = attached_model(
            frozen, samples, options, classes=columns.classes, fractions=fractions
        )
        frozen = attached.frozen
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
        "pixels": PER_IMAGE if pixels is None else pixels,
        "mapper": mapper,
    }
    if progress is not None:
        how["progress"] = lambda done, total: progress("cache", done, total)
    cache = build_cache(frozen, table, mapping, task=options.task, classes=columns.classes, **how)
    usable = np.setdiff1d(np.arange(cache.n_rows), np.fromiter(cache.bad, np.int64))
    if told := left_out(cache):
        if len(usable) < cache.n_rows * LEAST_USABLE:
            raise DataError(f"{data}: {told}; mend them, or take them out of the table")
        frozen = dataclasses.replace(frozen, notes=(told, *frozen.notes))
    if link in ("log", "log_sigmoid") and not _are_probabilities(cache.z[usable]):
        # The few rows that opened the model looked like probabilities; all of them do not.
        link = "identity" if link == "log" else "sigmoid"
    linear = frozen.head
    several = options.task == "classification" and frozen.z_dim > 1 and linear is None
    # Samples inside the network were made of outputs as they were taken when it was opened.
    plain = attached is None and sampled is None
    if several and plain and link == "identity" and _are_probabilities(cache.z[usable]):
        # As answers that a graph only hands on: rows made up to open it showed nothing.
        link = "log"
    if linear is not None and link == "sigmoid":
        linear = logits.two_class_head(linear)
    material = Material(
        frozen, linear, link, mapping, columns.classes, cache, usable, sampled, attached
    )
    inputs = mapping.inputs_only()
    if production is not None:
        coming = build_cache(frozen, open_table(production), inputs, task=options.task, **how)
        fine = np.setdiff1d(np.arange(coming.n_rows), np.fromiter(coming.bad, np.int64))
        if len(fine) == 0:
            raise DataError(f"{production}: every row is faulty")
        step = -(-len(fine) // MOST_PRODUCTION)
        theirs = dataclasses.replace(material, cache=coming).features(fine[::step])
        material = dataclasses.replace(material, production=theirs)
    if train_data is None:
        return material
    seen = build_cache(frozen, open_table(train_data), inputs, task=options.task, **how)
    good = np.setdiff1d(np.arange(seen.n_rows), np.fromiter(seen.bad, np.int64))
    return dataclasses.replace(
        material,
        train=seen.shared(good, link),
        overlap=int(np.isin(cache.content_hashes[usable], seen.content_hashes[good]).sum()),
    )


def left_out(cache: Cache) -> str | None:
    """How many rows (or images) cannot be used, and the commonest reason; None where all can."""
    if not cache.bad:
        return None
    fault, n = Counter(cache.bad.values()).most_common(1)[0]
    row = min(r for r, text in cache.bad.items() if text == fault) // cache.per
    what = "rows" if cache.per == 1 else "images"
    bad, of = len(cache.bad) // cache.per, cache.n_rows // cache.per
    like = f" and {n // cache.per - 1:,} like it" if n > cache.per else ""
    return f"{bad:,} of {of:,} {what} are left out: row {row}{like}: {fault}"


def _check_model(frozen: Frozen, options: FitOptions, pixels: int | None) -> None:
    """What an opened model shows to be impossible, before any pass over the data."""
    if frozen.dense is None and pixels is not None:
        raise DataError("--pixels is for a model of maps; this one answers one value a row")
    if options.scaling in BINARY and frozen.z_dim > 2:
        raise FitError(
            f"--scaling {options.scaling} is for two classes and this model has {frozen.z_dim}; "
            f"take svs or sms, or --confidence {options.scaling}"
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
    if material.mapping.split_by is not None or material.frozen.dense is not None:
        taken[2] = one_per_key(material.cache, taken[2])
    module, calibration, conformal, test = (material.features(rows) for rows in taken)
    groups, u = beside(material, taken[2])
    parts = Parts(
        module,
        calibration,
        conformal,
        material.per,
        groups,
        u,
        production=material.production,
        strange={s.name: (s.kind, s.beside(taken[1])) for s in material.strange},
        keys=material.cache.split_keys[taken[1]],
    )
    return parts, test


def beside(material: Material, rows: Array) -> tuple[Array | None, F64]:
    """The groups of cached rows, where there is a column of them, and their u for randomised
    scores."""
    cache = material.cache
    groups = None if cache.groups is None else cache.groups[rows]
    return groups, uniforms(cache.content_hashes[rows])


def raw_rows(material: Material, data: str | Path, rows: Array) -> dict[str, Array]:
    """The inputs of a few rows (ascending), read from the table again."""
    wanted = [c for cs in material.mapping.inputs.values() for c in cs]
    mapping = material.mapping.inputs_only()
    found: dict[str, list[Array]] = {s.name: [] for s in material.frozen.inputs}
    start = 0
    size = READ_ROWS if material.frozen.dense is None else READ_IMAGES
    for batch in open_table(data).batches(size, wanted):
        inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
        if len(inside):
            got = to_rows(batch, mapping, material.frozen.inputs, hashed=False)
            for key in found:
                found[key].append(got.inputs[key][inside])
        start += batch.num_rows
        if start > rows[-1]:
            break
    return {k: np.concatenate(v) for k, v in found.items()}


def one_per_key(cache: Cache, rows: Array) -> Array:
    """Of ``rows``, the one with the smallest content hash for each split key, in order; all drawn
    pixels of the one image where rows are pixels."""
    items = rows[:: cache.per]
    order = np.lexsort((cache.content_hashes[items], cache.split_keys[items]))
    _, first = np.unique(cache.split_keys[items][order], return_index=True)
    return np.asarray((np.sort(items[order][first])[:, None] + np.arange(cache.per)).ravel())
