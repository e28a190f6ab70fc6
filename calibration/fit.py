"""``hedged fit``: a frozen model and a data set in, a verified bundle out.

open the model → cache (features, outputs, labels) in one pass → four disjoint splits by hash →
fit the head → measure it on the test rows → compile, check, write.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calibration.assemble import USES, Dataset, assemble
from calibration.bundle import Bundle, SplitRecord
from calibration.fit_head import fit_head
from calibration.fit_masks import control_misses
from calibration.fit_options import FitOptions, check_options
from calibration.fit_thresholds import Fitted, run_head
from calibration.material import (
    DEFAULT_SPLIT,
    ROLES,
    Material,
    Progress,
    beside,
    parts_of,
    prepare,
    raw_rows,
    split,
)
from calibration.quality import Piece, summary
from calibration.sampling import Sampling, linearised
from calibration.strange import corrupted_sets, given_sets
from posthoc import logits
from posthoc.contract import Array, Features, FitError, State
from posthoc.folds import Mapper
from posthoc.frozen import expose
from posthoc.methods.laplace.importing import import_laplace
from posthoc.model.memory import row_bytes
from posthoc.model.probe import difference
from posthoc.pixels import pixels
from posthoc.rows import SHARE
from posthoc.runtime import open_session
from posthoc.slices import in_slices, most_rows

GOLDEN_ROWS, GOLDEN_IMAGES = 8, 2
CHECK_ROWS, CHECK_IMAGES = 64, 4
BATCH_EFFECT = 0.1  # relative to the largest output; as much as a model is opened with
LINEARISED_ROWS = 500


def fit(
    model: str | Path | None,
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
    ood_data: Mapping[str, str | Path] | None = None,
    corrupt: bool | tuple[str, ...] = False,
    mapper: Mapper | None = None,
    **how: Any,
) -> Bundle:
    """Fit and write a bundle at ``out``. ``how`` goes to `prepare`.

    What is a sum over rows is made by the workers of ``mapper`` and merged in a fixed order: the
    cached outputs of the frozen model, the statistics of module and score, the figures of the test
    rows. How many workers there are does not show in them.

    ``ood_data`` are strange rows by name, ``corrupt`` asks for corrupted copies of the user's own
    (True: every kind): they help to choose the score, and have no part in any promise.

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
    if (ood_data or corrupt) and options.ood != "auto":
        raise FitError("--ood-data and --corrupt choose a score: they go with --ood auto")
    if laplace is not None and (options.method != "laplace" or options.settings):
        raise FitError(
            "an imported posterior stands in place of --method and has its own settings; "
            "leave --method and --set out"
        )
    if how.get("train_data") is not None and (laplace is not None or options.method == "none"):
        raise FitError("--train-data is for a module that is fitted here; leave it out")
    if (how.get("production") is not None) != (options.shift is not None):
        raise FitError("--shift target|covariate and --production FILE go together")
    material = prepare(
        model,
        data,
        options=options,
        progress=progress,
        sampling=sampling,
        fractions=fractions,
        mapper=mapper,
        **how,
    )
    also = {**how, "progress": progress, "mapper": mapper}
    material = _with_strange(material, data, options, ood_data or {}, corrupt, also)
    posterior = None if laplace is None else _imported(laplace, material, options)
    fitted, _, roles = fit_material(material, options, fractions, posterior, mapper)
    if options.mask is not None:
        fitted = control_misses(fitted, material, data, roles, options)
    return write(
        material, fitted, roles, out, options, data, name=name, version=version, mapper=mapper
    )


def _with_strange(
    material: Material,
    data: str | Path,
    options: FitOptions,
    paths: Mapping[str, str | Path],
    corrupt: bool | tuple[str, ...],
    how: Mapping[str, Any],
) -> Material:
    """The material with the strange rows that its score is chosen by."""
    if not paths and not corrupt:
        return material
    found, _ = given_sets(material, paths, options.task, how)
    if corrupt:
        kinds = corrupt if isinstance(corrupt, tuple) else None
        found += corrupted_sets(material, data, kinds, seed=options.seed)[0]
    return dataclasses.replace(material, strange=tuple(found))


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
    mapper: Mapper | None = None,
) -> tuple[Fitted, Features, Array]:
    """(fitted head, test rows, role of every usable row) for the seed in ``options``."""
    roles = split(material, options.seed, fractions)
    parts, test = parts_of(material, roles)
    own = material.shared(rows_of(material, roles, "module"))
    fitted = fit_head(
        material.linear, parts, options, posterior, material.train, own=own, mapper=mapper
    )
    return _with_network(fitted, material), test, roles


def _with_network(fitted: Fitted, material: Material) -> Fitted:
    """The fitted head, whose module's state has what was fitted inside the network too."""
    if material.attached is None or fitted.head.module is None:
        return fitted
    name, state = fitted.head.module
    own = State(
        state.tensors | material.attached.tensors, {**material.attached.facts, **state.settings}
    )
    return dataclasses.replace(
        fitted,
        head=fitted.head.with_(module=(name, own)),
        module=fitted.module.model_copy(update={"settings": dict(own.settings)}),
    )


def write(
    material: Material,
    fitted: Fitted,
    roles: Array,
    out: Path,
    options: FitOptions,
    data: str | Path,
    *,
    name: str | None = None,
    version: str = "1",
    mapper: Mapper | None = None,
) -> Bundle:
    """Measure the head on the test rows, compile it behind the model and write the bundle."""
    dense, per = material.frozen.dense is not None, material.per
    count = CHECK_ROWS if not dense else CHECK_IMAGES
    chosen = rows_of(material, roles, "test")[: count * per]
    if len(chosen) == 0:
        raise FitError("no test rows: give more data or another --split")
    items = roles[::per]
    counts = Counter(ROLES[i] for i in items)
    raw = raw_rows(material, data, chosen[::per] // per)
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
        golden=GOLDEN_ROWS if not dense else GOLDEN_IMAGES,
        features=_asked_again(material, raw, chosen),
        pixels=_pixels(material, chosen),
        roles=np.asarray([ROLES[i] for i in items]),
        hashes=material.cache.content_hashes[material.usable[::per]],
        keys=material.cache.split_keys[material.usable[::per]],
        reference=_reference(material, fitted, roles),
        summary={
            "rows": int(material.cache.n_rows) // per,
            "bad_rows": len(material.cache.bad) // per,
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
        evaluation=summary(fitted, _tested(material, rows_of(material, roles, "test")), mapper)
        | _beside(material, data, roles),
    )


def rows_of(material: Material, roles: Array, role: str) -> Array:
    """The usable rows of a role."""
    return np.asarray(material.usable[roles == ROLES.index(role)])


def _tested(material: Material, rows: Array) -> list[Piece]:
    """Test rows in the parts that they are measured in."""
    size = SHARE // material.per * material.per or material.per
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [Piece(material.shared(part).shares[0], *beside(material, part)) for part in parts]


def _beside(material: Material, data: str | Path, roles: Array) -> dict[str, Any]:
    """laplace-torch's linearised predictive on some test rows, where weights were sampled."""
    if material.sampled is None:
        return {}
    rows = material.usable[roles == ROLES.index("test")][:LINEARISED_ROWS]
    (x,) = raw_rows(material, data, rows).values()
    y = material.features(rows).y
    assert y is not None
    return {"linearised": linearised(material.sampled, x, y)}


def _asked_again(material: Material, raw: Mapping[str, Array], rows: Array) -> Features:
    """φ and z of a few rows in the batch of the check. The cache has them from others, in which
    kernels round differently and dynamic quantisation moves them by per cents; FitError beyond."""
    frozen = material.frozen
    names = [n for n in (frozen.z, frozen.phi) if n is not None]
    model = expose(frozen)
    session, most = open_session(model), most_rows(row_bytes(onnx.load_from_string(model), raw))
    values = in_slices(lambda feed: session.run(names, dict(feed)), raw, most)
    if frozen.dense is not None:
        index, axes = _pixels(material, rows), (frozen.dense.axis, frozen.dense.phi_axis)
        maps = [pixels(v, a) for v, a in zip(values, axes, strict=False)]
        values = [m[np.arange(len(m))[:, None], index].reshape(-1, m.shape[2]) for m in maps]
    z, phi = values[0], values[1] if frozen.phi is not None else None
    if difference(z, material.cache.z[rows]) > BATCH_EFFECT:
        raise FitError(
            "the cached outputs are not the fused graph's on the same rows: the cache is another "
            "model's or table's; remove it and fit again"
        )
    return Features(phi, logits.to_logits(z, material.link))


def _pixels(material: Material, rows: Array) -> Array | None:
    """Which pixels of their images some rows are, N×per; None where rows are no pixels."""
    found = material.cache.pixels
    return None if found is None else np.asarray(found[rows].reshape(-1, material.per))


def _items(material: Material, roles: Array) -> dict[str, int] | None:
    """Distinct split keys of each role; None where rows are the items."""
    if material.mapping.split_by is None and material.frozen.dense is None:
        return None
    keys = material.cache.split_keys[material.usable]
    return {r: len(np.unique(keys[roles == i])) for i, r in enumerate(ROLES)}


def _reference(material: Material, fitted: Fitted, roles: Array) -> dict[str, Array]:
    """What traffic is held against: confidence, entropy and OOD score of conformal rows, or their
    error bar, of several outputs its mean; of an image those of one pixel."""
    mask = roles[:: material.per] == ROLES.index("conformal")
    made = run_head(fitted.head, material.features(material.usable[:: material.per][mask]))
    out: dict[str, Array] = {}
    for key in ("confidence", "entropy", "std", "ood_score", "ood_pvalue", "set_size"):
        if key in made:
            column = np.full(len(mask), np.nan)
            column[mask] = made[key].mean(axis=1) if key == "std" else made[key]
            out[key] = column
    return out
