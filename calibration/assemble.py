"""From a fitted head to a bundle on disk: compile, check end to end on real rows, write."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as save_tensors

from calibration.bundle import (
    CONFORMAL,
    EXAMPLES,
    GOLDEN,
    HEAD,
    PREDICTOR,
    REFERENCE,
    STATE,
    Bundle,
    FrozenRecord,
    Manifest,
    SplitRecord,
    write_bundle,
)
from calibration.compile import check_head, compile_head, compile_predictor
from calibration.conformal.intervals import QUANTILE_LEVELS
from calibration.fit_head import FitOptions, Fitted
from calibration.head import reference
from posthoc.contract import Array, Features, FitError
from posthoc.data import TableMapping
from posthoc.frozen import Frozen
from posthoc.links import Link
from posthoc.runtime import open_session

USES = {
    "module": "posterior, out-of-distribution score",
    "calibration": "temperature and module strength, choice of settings and score",
    "conformal": "final ranks, p-values, flag and abstention thresholds",
    "test": "measuring only",
}
END_TO_END = 1e-4  # fused graph against cached outputs: other batch shapes, other kernels


@dataclass(frozen=True, slots=True)
class Dataset:
    """What the bundle remembers of its data: names, mapping, split, and real rows.

    ``rows`` are raw inputs by name (the golden rows), ``features`` the same rows from the cache;
    ``roles`` and ``hashes`` cover every row that the fit saw, with its head outputs in
    ``reference`` (NaN where not computed).
    """

    mapping: TableMapping
    classes: tuple[str, ...] | None
    split: SplitRecord
    link: Link
    rows: dict[str, Array]
    features: Features
    roles: Array
    hashes: Array
    reference: dict[str, Array]
    summary: dict[str, Any] = field(default_factory=dict)


def assemble(
    out: Path,
    frozen: Frozen,
    fitted: Fitted,
    data: Dataset,
    options: FitOptions,
    *,
    name: str,
    version: str,
    evaluation: Mapping[str, Any] | None = None,
) -> Bundle:
    """Compile, check on the golden rows and write the bundle at ``out``.

    Raises FitError when head or predictor disagree with the float64 reference, and BundleError
    when ``out`` exists.
    """
    head = fitted.head
    head_model = compile_head(head)
    differences = check_head(head, head_model, data.features.phi, data.features.z)
    fused = compile_predictor(
        head, frozen.model, opset=frozen.opset, phi=frozen.phi, z=frozen.z, link=data.link
    )
    session = open_session(fused.model)
    outputs = [fused.names[s.name] for s in fused.outputs]
    answers = dict(
        zip([s.name for s in fused.outputs], session.run(outputs, data.rows), strict=True)
    )
    _check_end_to_end(answers, reference(head, data.features.phi, data.features.z))
    manifest = Manifest(
        name=name,
        version=version,
        task=options.task,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=data.classes,
        mapping=data.mapping,
        inputs=frozen.inputs,
        outputs=fused.outputs,
        frozen_outputs=frozen.outputs,
        output_names=fused.names,
        frozen=FrozenRecord(
            file=frozen.file,
            size=frozen.size,
            sha256=frozen.sha256,
            head=frozen.head_node,
            features=None if data.features.phi is None else int(data.features.phi.shape[1]),
            output=frozen.output,
        ),
        module=fitted.module,
        scaling={
            "temperature": head.temperature,
            "strength": head.strength,
            "temperature_alone": fitted.scaling.temperature_alone,
        },
        conformal=fitted.conformal,
        quantile_levels=QUANTILE_LEVELS if options.task == "regression" else (),
        ood=fitted.ood,
        abstain=fitted.abstain,
        splits=data.split,
        data={**data.summary, "head_max_difference": differences},
        evaluation=dict(evaluation or {}),
        versions=versions(),
    )
    files = {
        PREDICTOR: fused.model,
        HEAD: head_model,
        STATE: save_tensors(_state(fitted)),
        CONFORMAL: save_tensors({k: np.ascontiguousarray(v) for k, v in fitted.scores.items()}),
        REFERENCE: _reference_table(data),
        GOLDEN: _golden(data.rows, answers),
        EXAMPLES: _examples(data.rows),
    }
    return write_bundle(out, manifest, files)


def _check_end_to_end(got: Mapping[str, Array], want: Mapping[str, Array]) -> None:
    for name, value in got.items():
        if value.dtype.kind != "f" or name == "ood_pvalue":
            continue
        if not np.isfinite(value).all() and np.isfinite(want[name]).all():
            raise FitError(f"the fused graph gives a {name} that is not finite")
        if not np.allclose(value, want[name], rtol=END_TO_END * 10, atol=END_TO_END * 10):
            worst = float(np.nanmax(np.abs(value - want[name])))
            raise FitError(f"the fused graph's {name} is off by {worst:.1e} from its reference")


def _state(fitted: Fitted) -> dict[str, Array]:
    """Every tensor of the head, float64 as fitted, under names that say what they are."""
    head = fitted.head
    tensors: dict[str, Array] = {}
    if head.module is not None:
        tensors |= {f"module/{k}": v for k, v in head.module[1].tensors.items()}
    if head.ood is not None:
        for m in head.ood.members:
            tensors |= {f"ood/{m.name}/{k}": v for k, v in m.state.tensors.items()}
        tensors |= {"ood/table": head.ood.table, "ood/pvalues": head.ood.pvalues}
    for key in ("eps", "noise", "quantile_factors"):
        if (value := getattr(head, key)) is not None:
            tensors[key] = value
    tensors["scaling"] = np.asarray([head.temperature, head.strength])
    return {k: np.ascontiguousarray(v) for k, v in tensors.items()}


def _reference_table(data: Dataset) -> bytes:
    columns: dict[str, Any] = {
        "role": pa.array(np.asarray(data.roles, dtype=object), pa.string()),
        "row_hash": pa.array(np.asarray(data.hashes, np.uint64)),
    }
    columns |= {k: pa.array(np.asarray(v, np.float64)) for k, v in data.reference.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def _golden(rows: Mapping[str, Array], answers: Mapping[str, Array]) -> bytes:
    sink = io.BytesIO()
    np.savez(
        sink,
        allow_pickle=False,
        **{f"in/{k}": v for k, v in rows.items()},
        **{f"out/{k}": v for k, v in answers.items()},
    )
    return sink.getvalue()


def _examples(rows: Mapping[str, Array]) -> bytes:
    """A first request that works: two real rows as friendly JSON."""
    inputs = {k: v[:2].tolist() for k, v in rows.items()}
    return json.dumps({"predict": {"inputs": inputs}}).encode()


def versions() -> dict[str, str]:
    """Versions of what a bundle's numbers depend on."""
    names = ("hedged", "numpy", "onnx", "scipy", "pyarrow")
    found = {n: metadata.version(n) for n in names}
    for runtime in ("onnxruntime-gpu", "onnxruntime"):
        try:
            found[runtime] = metadata.version(runtime)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}
