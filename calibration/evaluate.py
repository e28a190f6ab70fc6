"""``hedged evaluate``: run a bundle's fused graph over labelled rows and measure what it says.

Rows that the fit used are dropped and counted: their hashes are in the bundle. The fit's own test
rows stay. The frozen model's probabilities are its own graph output, so all three columns of the
comparison come from the same run.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from calibration.bundle import REFERENCE, Bundle
from calibration.evaluation import Evaluation, evaluate_classification, evaluate_regression
from calibration.predictor import Predictor
from posthoc.contract import Array, DataError
from posthoc.data import Rows, TableMapping, open_table, to_rows
from posthoc.links import TINY, log_softmax

Progress = Callable[[str, int, int], None]
BATCH = 256


def evaluate(
    bundle: Bundle | Predictor | str | Path,
    data: str | Path,
    *,
    ood_data: Mapping[str, str | Path] | None = None,
    device: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
    seed: int = 0,
) -> Evaluation:
    """Every figure of the report, from labelled rows and (for OOD scores) strange rows by name.

    Raises DataError when no row is left after those the fit saw are dropped, and for a table that
    the bundle's mapping does not fit.
    """
    predictor = (
        bundle
        if isinstance(bundle, Predictor)
        else Predictor(bundle, device=device, threads=threads)
    )
    manifest = predictor.manifest
    levels = {g.alpha: predictor.q_hat(g.alpha) for g in manifest.conformal.guarantees}
    wanted = [*predictor.fields, *_frozen_output(predictor)]
    run = _Pass(predictor, wanted, levels if manifest.task == "classification" else {})
    made, y, dropped = run.over(data, "evaluate", labelled=True, progress=progress)
    if len(y) == 0:
        raise DataError(f"{data}: no row is left ({dropped} were used by the fit or are faulty)")
    about = {
        "model": f"{manifest.name} {manifest.version} ({manifest.frozen.file})",
        "bundle": predictor.bundle.identity,
        "module": manifest.module.name,
        "rows": f"{len(y)} evaluated, {dropped} dropped (seen by the fit, or faulty)",
        "splits": ", ".join(f"{k} {v}" for k, v in manifest.splits.rows.items()),
    }
    strange = {}
    for name, path in (ood_data or {}).items():
        rows, _, _ = run.over(path, name, labelled=False, progress=progress)
        strange[name] = _scores(predictor, rows)
    n_conformal = manifest.conformal.guarantees[0].n
    if manifest.task == "regression":
        half = {a: q * made["std"] for a, q in levels.items()}
        return evaluate_regression(
            fields=made,
            constant_std=np.sqrt(_noise(predictor)) * manifest.scaling["temperature_alone"],
            y=y,
            intervals={a: (made["mean"] - h, made["mean"] + h) for a, h in half.items()},
            n_conformal=n_conformal,
            quantile_levels=manifest.quantile_levels,
            ood_in=_scores(predictor, made),
            ood_out=strange,
            about=about,
            seed=seed,
        )
    log_p = _frozen_log_probs(predictor, made)
    scaled = log_softmax(log_p / manifest.scaling["temperature_alone"])
    return evaluate_classification(
        frozen_probs=np.exp(log_p),
        scaled_probs=np.exp(scaled),
        fields=made,
        y=y,
        sets={a: made[f"set@{a}"] for a in levels},
        n_conformal=n_conformal,
        ood_in=_scores(predictor, made),
        ood_out=strange,
        about=about,
        seed=seed,
    )


def seen_hashes(bundle: Bundle) -> Array:
    """Content hashes of the rows that the fit used for anything but testing, sorted."""
    table = pq.read_table(io.BytesIO(bundle.files[REFERENCE]), columns=["role", "row_hash"])
    role = np.asarray(table["role"].to_pylist())
    return np.sort(np.asarray(table["row_hash"])[role != "test"])


class _Pass:
    """One pass of the fused graph over a table, batch by batch."""

    def __init__(self, predictor: Predictor, outputs: list[str], levels: Mapping[float, float]):
        self.predictor = predictor
        self.outputs = outputs
        self.levels = levels
        self.seen = seen_hashes(predictor.bundle)

    def over(
        self, data: str | Path, what: str, *, labelled: bool, progress: Progress | None
    ) -> tuple[dict[str, Array], Array, int]:
        """(outputs by name and ``set@alpha``, labels, rows dropped)."""
        manifest = self.predictor.manifest
        table = open_table(data)
        columns = [c for c in manifest.mapping.columns(target=labelled) if c in table.columns]
        parts: dict[str, list[Array]] = {}
        labels: list[Array] = []
        done = dropped = 0
        for batch in table.batches(BATCH, columns):
            rows = to_rows(
                batch,
                manifest.mapping if labelled else _unlabelled(manifest.mapping),
                manifest.inputs,
                task=manifest.task,
                classes=manifest.classes,
                need_target=labelled,
            )
            keep = self._usable(rows, labelled)
            if keep.any():
                for name, value in self._run({k: v[keep] for k, v in rows.inputs.items()}).items():
                    parts.setdefault(name, []).append(value)
                if rows.y is not None:
                    labels.append(rows.y[keep])
            dropped += int((~keep).sum())
            done += len(keep)
            if progress is not None:
                progress(what, done, table.n_rows)
        made = {k: np.concatenate(v) for k, v in parts.items()}
        return made, np.concatenate(labels) if labels else np.zeros(0), dropped

    def _usable(self, rows: Rows, labelled: bool) -> Array:
        keep = np.ones(len(rows), bool)
        keep[list(rows.bad)] = False
        if labelled and len(self.seen):
            at = np.minimum(np.searchsorted(self.seen, rows.content_hashes), len(self.seen) - 1)
            keep &= self.seen[at] != rows.content_hashes
        return keep

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        out = self.predictor.run(inputs, outputs=self.outputs)
        for i, (alpha, q) in enumerate(self.levels.items()):
            # The first level is the graph's default: no second run for it.
            out[f"set@{alpha}"] = (
                out["set"]
                if i == 0
                else self.predictor.run(inputs, outputs=["set"], q_hat=q)["set"]
            )
        return out


def _unlabelled(mapping: TableMapping) -> TableMapping:
    return mapping.model_copy(update={"target": (), "group": None, "split_by": None, "id": None})


def _frozen_output(predictor: Predictor) -> list[str]:
    name = predictor.manifest.frozen.output
    return [name] if name is not None and predictor.manifest.task == "classification" else []


def _frozen_log_probs(predictor: Predictor, made: Mapping[str, Array]) -> Array:
    """log p N×C of the frozen model from its own output: logits, probabilities, or one sigmoid."""
    z = np.asarray(made[_frozen_output(predictor)[0]], np.float64).reshape(len(made["label"]), -1)
    link = predictor.manifest.data.get("link")
    as_probs = bool((z >= 0).all() and (z <= 1).all())
    if z.shape[1] == 1:
        p = z if as_probs else 1 / (1 + np.exp(-z))
        return np.asarray(np.log(np.maximum(np.concatenate([1 - p, p], 1), TINY)))
    if as_probs and (link == "log" or np.allclose(z.sum(1), 1, atol=1e-3)):
        return np.asarray(np.log(np.maximum(z, TINY)))
    return log_softmax(z)


def _scores(predictor: Predictor, made: Mapping[str, Array]) -> dict[str, Array]:
    """Scores that tell strange rows: ours, and maximum softmax of the frozen model."""
    out: dict[str, Array] = {}
    if "ood_score" in made:
        out["hedged"] = made["ood_score"]
    if predictor.manifest.task == "classification" and _frozen_output(predictor):
        out["msp"] = -np.exp(_frozen_log_probs(predictor, made)).max(1)
        if "epistemic" in made:
            out["epistemic"] = made["epistemic"]
    elif "epistemic_std" in made:
        out["epistemic"] = made["epistemic_std"].max(1)
    return out


def _noise(predictor: Predictor) -> Array:
    return np.asarray(predictor.bundle.tensors("state.safetensors")["noise"])
