"""``hedged evaluate``: run a bundle's fused graph over labelled rows and measure what it says.

Rows that the fit used are dropped and counted: their hashes are in the bundle. The fit's own test
rows stay. The frozen model's probabilities are its own graph output, so all three columns of the
comparison come from the same run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calibration.bundle import Bundle, Manifest
from calibration.conformal.intervals import signed_residuals
from calibration.evaluation import Evaluation, evaluate_classification, evaluate_regression
from calibration.evaluation.corrupted import DEFAULT, Corrupted, Knowing, Spoiler, asked_for
from calibration.evaluation.dense import evaluate_maps
from calibration.evaluation.parts import Named, Places
from calibration.evaluation.records import SetSummary
from calibration.evaluation.retrieval import retrieved
from calibration.evaluation.row_pass import LOGITS, Progress, RowPass, strangeness
from calibration.evaluation.sets import Described, SetRows, summarise
from calibration.predictor import Predictor
from calibration.recalibration import TRANSFORMS, Base, log_density
from calibration.unseen import seen_hashes
from posthoc.contract import Array, DataError
from posthoc.data import open_table
from posthoc.folds import log_softmax

__all__ = ["evaluate", "named_sets", "seen_hashes"]
FIRST = "data"


def evaluate(
    bundle: Bundle | Predictor | str | Path,
    data: str | Path | Mapping[str, str | Path],
    *,
    ood_data: Mapping[str, str | Path] | None = None,
    corrupt: Sequence[str] = (),
    severities: Sequence[int] = DEFAULT,
    device: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
    seed: int = 0,
    data_range: float | None = None,
) -> Evaluation:
    """Every figure of the report, from labelled rows and (for OOD scores) strange rows by name.

    ``data`` may be several labelled sets by name: the first is what every figure is of, and
    ``.sets`` of the answer holds it beside the others. ``corrupt`` names corruptions
    (`calibration.corruption.CORRUPTIONS`; ["all"]: every one that fits the model's inputs) that
    make further sets of the first one, one at each of ``severities`` (1 to 5).

    Of a dense bundle rows are images, and what is resampled are images. ``data_range`` is the range
    of the target's values there (255, 1.0), for the peak signal-to-noise ratio of restored images.

    Raises DataError when no row of a set is left after those the fit saw are dropped, for a table
    that the bundle's mapping does not fit, and for a corruption that does not fit the inputs.
    """
    predictor = (
        bundle
        if isinstance(bundle, Predictor)
        else Predictor(bundle, device=device, threads=threads)
    )
    manifest = predictor.manifest
    if data_range is not None and (manifest.dense is None or manifest.task != "regression"):
        raise DataError("a range of values is for a model that makes maps of values; leave it out")
    spoilt = asked_for(manifest.inputs, corrupt, severities) if corrupt else ()
    sets = named_sets(data, spoilt)
    for path in [*sets.values(), *(ood_data or {}).values()]:
        open_table(path)  # a table that cannot be read is better found before the first pass
    if manifest.dense is not None:
        return evaluate_maps(
            predictor,
            sets,
            ood_data=ood_data or {},
            spoilt=spoilt,
            about=_about(predictor),
            progress=progress,
            data_range=data_range,
            seed=seed,
        )
    path = next(iter(sets.values()))
    levels = {g.alpha: predictor.q_hat(g.alpha) for g in manifest.conformal.guarantees}
    run = RowPass(predictor, levels)
    knowing = Knowing(open_table(path).n_rows) if spoilt else None
    rows = _whole(run, path, "evaluate", labelled=True, progress=progress, knowing=knowing)
    dropped = run.dropped
    if rows is None:
        raise DataError(f"{path}: no row is left ({dropped} were used by the fit or are faulty)")
    made, y = rows.made, rows.y
    about = _about(predictor)
    about["rows"] = _counted(len(y), run)
    strange, doubts = {}, {}
    for out, where in (ood_data or {}).items():
        found = _whole(run, where, out, labelled=False, progress=progress)
        if found is None:
            raise DataError(f"{where}: none of its {run.dropped} rows can be used; each is faulty")
        strange[out] = strangeness(predictor, found.made)
        doubts[out] = found.made["confidence" if manifest.task == "classification" else "std"]
    n_conformal = manifest.conformal.guarantees[0].n
    if manifest.task == "regression":
        result = evaluate_regression(
            fields=made,
            constant_std=np.sqrt(_noise(predictor)) * manifest.scaling["temperature_alone"],
            frozen_mean=made.get(LOGITS),
            y=y,
            intervals={a: (made[f"lower@{a}"], made[f"upper@{a}"]) for a in levels},
            n_conformal=n_conformal,
            quantile_levels=manifest.quantile_levels,
            ood_in=strangeness(predictor, made),
            ood_out=strange,
            ood_doubts=doubts,
            groups=None if manifest.splits.by is None else rows.keys,
            named=_named(predictor, rows.groups),
            places=rows.places,
            log_density=_log_density(predictor, made, y),
            about=about,
            seed=seed,
        )
    else:
        log_p = log_softmax(made[LOGITS])
        scaled = log_softmax(log_p / manifest.scaling["temperature_alone"])
        result = evaluate_classification(
            frozen_probs=np.exp(log_p),
            scaled_probs=np.exp(scaled),
            fields=made,
            y=y,
            sets={a: made[f"set@{a}"] for a in levels},
            n_conformal=n_conformal,
            ood_in=strangeness(predictor, made),
            ood_out=strange,
            ood_doubts=doubts,
            groups=None if manifest.splits.by is None else rows.keys,
            named=_named(predictor, rows.groups),
            places=rows.places,
            classes=manifest.classes,
            about=about,
            seed=seed,
        )
        doubt = {"confidence": -made["confidence"], **strangeness(predictor, made)}
        within = retrieved(predictor, run, path, y, rows.hashes, doubt, progress)
        result = result.model_copy(update={"retrieved": within})
    if len(sets) + len(spoilt) > 1:
        known = None if knowing is None else knowing.known()
        learnt = {} if known is None else {one: Spoiler(one, known, seed) for one in spoilt}
        compared = _sets(run, sets, learnt, rows, dropped, progress, seed)
        result = result.model_copy(update={"sets": compared})
    return _banded(result, manifest)


def named_sets(
    data: str | Path | Mapping[str, str | Path], spoilt: Sequence[Corrupted] = ()
) -> dict[str, str | Path]:
    """Labelled sets by name. Raises DataError where there is none, or where one is named like a
    corruption."""
    sets = dict(data) if isinstance(data, Mapping) else {FIRST: data}
    if not sets:
        raise DataError("there is no labelled set to evaluate; give data")
    for name in [s.name for s in spoilt]:
        if name in sets:
            raise DataError(f"{name!r} is the name of a corrupted set; name that set otherwise")
    return sets


class _Rows(NamedTuple):
    """All usable rows of a table: what the graph made of them, labels, hashes, split keys, values
    of the group column, and where they stand."""

    made: dict[str, Array]
    y: Array
    hashes: Array
    keys: Array
    groups: Array | None
    places: Places


def _counted(n: int, run: RowPass) -> str:
    """How many rows the figures are of, and what became of the others."""
    told = f"{n:,} evaluated, {run.seen:,} dropped that the fit saw, {run.faulty:,} faulty"
    if run.seen:
        told += (
            ". A new row equal to one that the fit saw is dropped, too: in a table of few distinct "
            "rows the figures are of the rarer ones"
        )
    return told


def _whole(
    run: RowPass,
    data: str | Path,
    what: str,
    *,
    labelled: bool,
    progress: Progress | None,
    knowing: Knowing | None = None,
) -> _Rows | None:
    """A table in one; None where no row of it can be used. ``knowing`` learns its inputs."""
    made: dict[str, list[Array]] = {}
    rest: dict[str, list[Array]] = {}
    for batch in run.over(data, what, labelled=labelled, progress=progress):
        if knowing is not None:
            knowing.add(batch.inputs, batch.hashes)
        for name, value in batch.made.items():
            made.setdefault(name, []).append(value)
        columns = {"y": batch.y, "hashes": batch.hashes, "keys": batch.keys}
        columns |= {"groups": batch.groups, "places": batch.places, "ids": batch.ids}
        for name, column in columns.items():
            if column is not None:
                rest.setdefault(name, []).append(column)
    if not made:
        return None
    found = {name: np.concatenate(v) for name, v in rest.items()}
    return _Rows(
        {name: np.concatenate(v) for name, v in made.items()},
        found.get("y", np.zeros(0)),
        found["hashes"],
        found["keys"],
        found.get("groups"),
        Places(found["places"], found.get("ids")),
    )


def _sets(
    run: RowPass,
    sets: Mapping[str, str | Path],
    spoilt: Mapping[Corrupted, Spoiler],
    first: _Rows,
    dropped: int,
    progress: Progress | None,
    seed: int,
) -> tuple[SetSummary, ...]:
    """Every set as one line of the table: the first, the others, and the first one spoilt."""
    manifest = run.predictor.manifest
    (name, path), *others = sets.items()
    own = manifest.conformal.given is None and manifest.conformal.shift is None

    def summary(rows: SetRows, what: Described) -> SetSummary:
        return summarise(
            rows,
            what,
            n_conformal=manifest.conformal.guarantees[0].n,
            grouped=manifest.splits.by is not None,
            banded=own,
            first=None if rows is held else columns,
            seed=seed,
        )

    held = SetRows(manifest.task, manifest.alphas)
    held.add(first.made, first.y, first.keys)
    columns = held.columns()
    found = [summary(held, Described(name, dropped))]
    for other, where in others:
        rows = SetRows(manifest.task, manifest.alphas)
        for batch in run.over(where, other, labelled=True, progress=progress):
            assert batch.y is not None
            rows.add(batch.made, batch.y, batch.keys)
        found.append(summary(rows, Described(other, run.dropped)))
    for one, spoil in spoilt.items():
        rows = SetRows(manifest.task, manifest.alphas)
        for batch in run.over(path, one.name, labelled=True, progress=progress, spoil=spoil):
            assert batch.y is not None
            rows.add(batch.made, batch.y, batch.keys)
        found.append(summary(rows, Described(one.name, dropped, one.corruption, one.severity)))
    return tuple(found)


def _banded(found: Evaluation, manifest: Manifest) -> Evaluation:
    """Without the band of one threshold, where there are several or another law holds."""
    if manifest.conformal.given is None and manifest.conformal.shift is None:
        return found
    levels = tuple(v.model_copy(update={"banded": False}) for v in found.levels)
    return found.model_copy(update={"levels": levels})


def _about(predictor: Predictor) -> dict[str, str]:
    """The header's lines that are the bundle's own."""
    manifest = predictor.manifest
    about = {
        "model": f"{manifest.name} {manifest.version} ({manifest.frozen.file})",
        "bundle": predictor.bundle.identity,
        "module": manifest.module.name,
        "answer": "the module's" if manifest.prediction == "module" else "the frozen model's",
        "splits": ", ".join(f"{k} {v}" for k, v in manifest.splits.rows.items()),
    }
    if beside := manifest.evaluation.get("linearised"):
        # It needs torch and the curvature, which no bundle holds: measured when it was fitted.
        about["linearised predictive of laplace-torch"] = (
            f"{beside['nll']:.4f} nats on {beside['rows']} test rows of the fit, where the bundle "
            f"has {manifest.evaluation['hedged']['nll']:.4f} on all of them"
        )
    return about


def _named(predictor: Predictor, groups: Array | None) -> Named | None:
    """The groups of the mapping's group column, and the conformal rows behind each, if its own."""
    if groups is None:
        return None
    conformal = predictor.manifest.conformal
    own = conformal.guarantees if conformal.given == "group" else ()
    return Named(groups.astype(str), {g.alpha: {c.name: c.n for c in g.cells} for g in own})


def _log_density(predictor: Predictor, made: Mapping[str, Array], y: Array) -> Array | None:
    """Of targets under the recalibrated distribution, N×K, where it has a density."""
    transforms = predictor.bundle.conformal_scores.get(TRANSFORMS)
    if transforms is None:
        return None
    base = Base(float(predictor.manifest.module.settings.get("df", math.inf)))
    mean, std = made["mean"], made["std"]
    truth = np.reshape(y, mean.shape)
    return log_density(base, transforms, signed_residuals(truth, mean, std), std)


def _noise(predictor: Predictor) -> Array:
    return np.asarray(predictor.bundle.tensors("state.safetensors")["noise"])
