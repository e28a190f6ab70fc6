"""``hedged evaluate``: run a bundle's fused graph over labelled rows and measure what it says.

Rows that the fit used are dropped and counted: their hashes are in the bundle. The fit's own test
rows stay. The frozen model's probabilities are its own graph output, so all three columns of the
comparison come from the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from calibration.bundle import Bundle, Manifest
from calibration.conformal.intervals import signed_residuals
from calibration.evaluation import Evaluation, evaluate_classification, evaluate_regression
from calibration.evaluation.dense import evaluate_maps
from calibration.evaluation.parts import Named
from calibration.evaluation.unseen import Unseen, seen_hashes
from calibration.predictor import Predictor
from calibration.recalibration import TRANSFORMS, Base, log_density
from posthoc.contract import Array, DataError
from posthoc.data import open_table, to_rows
from posthoc.folds import log_softmax

__all__ = ["evaluate", "seen_hashes"]
Progress = Callable[[str, int, int], None]
BATCH = 256
LOGITS = "logits"  # what the frozen model itself says, beside the fields
GROUPS = "split key"
NAMED = "named group"


def evaluate(
    bundle: Bundle | Predictor | str | Path,
    data: str | Path,
    *,
    ood_data: Mapping[str, str | Path] | None = None,
    device: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
    seed: int = 0,
    data_range: float | None = None,
) -> Evaluation:
    """Every figure of the report, from labelled rows and (for OOD scores) strange rows by name.

    Of a dense bundle rows are images, and what is resampled are images. ``data_range`` is the range
    of the target's values there (255, 1.0), for the peak signal-to-noise ratio of restored images.

    Raises DataError when no row is left after those the fit saw are dropped, and for a table that
    the bundle's mapping does not fit.
    """
    predictor = (
        bundle
        if isinstance(bundle, Predictor)
        else Predictor(bundle, device=device, threads=threads)
    )
    manifest = predictor.manifest
    if data_range is not None and (manifest.dense is None or manifest.task != "regression"):
        raise DataError("a range of values is for a model that makes maps of values; leave it out")
    if manifest.dense is not None:
        return evaluate_maps(
            predictor,
            data,
            ood_data=ood_data or {},
            about=_about(predictor),
            progress=progress,
            data_range=data_range,
            seed=seed,
        )
    levels = {g.alpha: predictor.q_hat(g.alpha) for g in manifest.conformal.guarantees}
    run = _Pass(predictor, levels)
    made, y, dropped = run.over(data, "evaluate", labelled=True, progress=progress)
    if len(y) == 0:
        raise DataError(f"{data}: no row is left ({dropped} were used by the fit or are faulty)")
    about = _about(predictor)
    about["rows"] = f"{len(y)} evaluated, {dropped} dropped (seen by the fit, or faulty)"
    strange = {}
    for name, path in (ood_data or {}).items():
        rows, _, faulty = run.over(path, name, labelled=False, progress=progress)
        if not rows:
            raise DataError(f"{path}: none of its {faulty} rows can be used; each is faulty")
        strange[name] = _scores(predictor, rows)
    n_conformal = manifest.conformal.guarantees[0].n
    if manifest.task == "regression":
        found = evaluate_regression(
            fields=made,
            constant_std=np.sqrt(_noise(predictor)) * manifest.scaling["temperature_alone"],
            frozen_mean=made.get(LOGITS),
            y=y,
            intervals={a: (made[f"lower@{a}"], made[f"upper@{a}"]) for a in levels},
            n_conformal=n_conformal,
            quantile_levels=manifest.quantile_levels,
            ood_in=_scores(predictor, made),
            ood_out=strange,
            groups=_groups(predictor, made),
            named=_named(predictor, made),
            log_density=_log_density(predictor, made, y),
            about=about,
            seed=seed,
        )
        return _banded(found, manifest)
    log_p = log_softmax(made[LOGITS])
    scaled = log_softmax(log_p / manifest.scaling["temperature_alone"])
    found = evaluate_classification(
        frozen_probs=np.exp(log_p),
        scaled_probs=np.exp(scaled),
        fields=made,
        y=y,
        sets={a: made[f"set@{a}"] for a in levels},
        n_conformal=n_conformal,
        ood_in=_scores(predictor, made),
        ood_out=strange,
        groups=_groups(predictor, made),
        named=_named(predictor, made),
        about=about,
        seed=seed,
    )
    return _banded(found, manifest)


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


class _Pass:
    """One pass of the fused graph over a table, batch by batch."""

    def __init__(self, predictor: Predictor, levels: Mapping[float, float | Array]):
        self.predictor = predictor
        self.levels = levels
        self.unseen = Unseen(predictor.bundle)

    def over(
        self, data: str | Path, what: str, *, labelled: bool, progress: Progress | None
    ) -> tuple[dict[str, Array], Array, int]:
        """(fields, ``set@alpha`` or ``lower@alpha`` and ``upper@alpha``, logits, split keys and
        named groups; labels; rows dropped)."""
        manifest = self.predictor.manifest
        table = open_table(data)
        columns = [c for c in manifest.mapping.columns(target=labelled) if c in table.columns]
        parts: dict[str, list[Array]] = {}
        labels: list[Array] = []
        done = dropped = 0
        for batch in table.batches(BATCH, columns):
            rows = to_rows(
                batch,
                manifest.mapping if labelled else manifest.mapping.inputs_only(),
                manifest.inputs,
                task=manifest.task,
                classes=manifest.classes,
                need_target=labelled,
                n_classes=_width(self.predictor),
            )
            keep = self.unseen.usable(rows, labelled)
            if keep.any():
                inputs = rows.inputs | self.predictor.beside(rows.groups, rows.content_hashes)
                made = self._run({k: v[keep] for k, v in inputs.items()})
                made[GROUPS] = rows.split_keys[keep]
                if labelled and rows.groups is not None:
                    made[NAMED] = rows.groups[keep].astype(str)
                for name, value in made.items():
                    parts.setdefault(name, []).append(value)
                if rows.y is not None:
                    labels.append(rows.y[keep])
            dropped += int((~keep).sum())
            done += len(keep)
            if progress is not None:
                progress(what, done, table.n_rows)
        made = {k: np.concatenate(v) for k, v in parts.items()}
        return made, np.concatenate(labels) if labels else np.zeros(0), dropped

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        logits = self.predictor.manifest.frozen.logits
        beside = [] if logits is None else [logits]
        out = self.predictor.run(inputs, outputs=[*self.predictor.fields, *beside])
        if logits is not None:
            out[LOGITS] = out.pop(logits)
        names = ["set"] if "set" in out else ["lower", "upper"]
        for i, (alpha, q) in enumerate(self.levels.items()):
            # The first level is the graph's default: no second run for it.
            found = out if i == 0 else self.predictor.run(inputs, outputs=names, q_hat=q)
            out |= {f"{name}@{alpha}": found[name] for name in names}
        return out


def _width(predictor: Predictor) -> int | None:
    """Classes of a classifier."""
    found = [s.shape[1] for s in predictor.manifest.outputs if s.name == "probs"]
    return found[0] if found else None


def _groups(predictor: Predictor, made: Mapping[str, Array]) -> Array | None:
    """Ids of rows that are no independent evidence: equal split keys, where the fit had some."""
    return None if predictor.manifest.splits.by is None else made[GROUPS]


def _named(predictor: Predictor, made: Mapping[str, Array]) -> Named | None:
    """The groups of the mapping's group column, and the conformal rows behind each, if its own."""
    if NAMED not in made:
        return None
    conformal = predictor.manifest.conformal
    own = conformal.guarantees if conformal.given == "group" else ()
    return Named(made[NAMED], {g.alpha: {c.name: c.n for c in g.cells} for g in own})


def _scores(predictor: Predictor, made: Mapping[str, Array]) -> dict[str, Array]:
    """Scores that tell strange rows: ours, and maximum softmax of the frozen model."""
    out: dict[str, Array] = {}
    if "ood_score" in made:
        out["hedged"] = made["ood_score"]
    if LOGITS in made and predictor.manifest.task == "classification":
        out["msp"] = -np.exp(log_softmax(made[LOGITS])).max(1)
    if "epistemic" in made:
        out["epistemic"] = made["epistemic"]
    elif "epistemic_std" in made:
        out["epistemic"] = made["epistemic_std"].max(1)
    return out


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
