"""From a fitted head to a bundle on disk: compile, check end to end on real rows, write."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
    DenseRecord,
    FamilyRecord,
    FrozenRecord,
    Manifest,
    MemoryRecord,
    SplitRecord,
    write_bundle,
)
from calibration.compile import (
    Fused,
    behind,
    check_head,
    compile_head,
    mask_margins,
)
from calibration.conformal.cells import Cells
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import Fitted
from calibration.head import Head, reference
from calibration.shift.weighted import Weighted
from posthoc.contract import Array, Features, FitError, output_fields
from posthoc.data import TableMapping
from posthoc.frozen import Frozen
from posthoc.logits import Link
from posthoc.model.memory import row_bytes
from posthoc.opening import remaining_modules
from posthoc.pixels import Layout, taken
from posthoc.runtime import open_session
from posthoc.slices import in_slices, most_rows

Run = Callable[[Sequence[str], Mapping[str, Array]], list[Array]]  # names and rows → outputs
USES = {
    "module": "posterior, out-of-distribution score",
    "calibration": "temperature and module strength, choice of settings and score",
    "conformal": "final ranks, p-values, flag and abstention thresholds",
    "test": "measuring only",
}
# Fused graph against cached outputs: another batch shape means other kernels, and a bare classifier
# was seen to move by 6e-4 between batches of 1 and 32.
END_TO_END = 1e-3
NOTES = (
    "Coverage is an average over calibration and test rows, not a promise for any one row, class "
    "or group.",
    "p-values, the out-of-distribution flag and abstention share their conformal rows: each "
    "promise holds singly, not all jointly. Coverage among answered rows is not promised.",
)

OF_CELLS = (
    "Coverage is promised of each {given} by itself, as an average over its calibration and test "
    "rows, where it has enough of them; of no single row."
)
OF_MAPS = (
    "What is promised of sets and intervals is the expected share of a new image's pixels that are "
    "not covered: pixels of one image are no independent evidence, so images are counted.",
    "p-values, the out-of-distribution flag and abstention hold, each singly, for one random pixel "
    "of a new image; they share their conformal images.",
)
OF_MASKS = (
    "What is promised of the sets is that the pixels whose set holds the class are a mask that is "
    "expected to miss at most the given share of it, in a new image that shows it; nothing is "
    "promised of other classes."
)


@dataclass(frozen=True, slots=True)
class Dataset:
    """What the bundle remembers of its data: names, mapping, split, and real rows.

    ``rows`` are raw inputs by name to check the predictor on, of which the first ``golden`` are
    kept in the bundle; ``features`` are the same rows from the cache; ``roles``, ``hashes`` and
    ``keys`` cover every row that the fit saw, with its head outputs in ``reference`` (NaN where
    not computed).
    """

    mapping: TableMapping
    classes: tuple[str, ...] | None
    split: SplitRecord
    link: Link
    rows: dict[str, Array]
    golden: int
    features: Features
    pixels: Array | None  # of a dense model: which pixels of ``rows`` they are, N×per
    roles: Array
    hashes: Array
    keys: Array
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
    fused = behind(head, frozen, data.link)
    memory = _memory(fused.model, data.rows)
    run = partial(_run, open_session(fused.model), memory)
    _check_end_to_end(head, fused, run, data, frozen.dense)
    golden = {k: v[: data.golden] for k, v in data.rows.items()}
    answers = _answers(run, fused, golden)
    manifest = Manifest(
        name=name,
        version=version,
        task=options.task,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=data.classes,
        mapping=data.mapping,
        inputs=frozen.inputs,
        optional_inputs=fused.optional,
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
            logits=fused.logits,
        ),
        dense=None
        if frozen.dense is None or data.pixels is None
        else DenseRecord(
            channels=frozen.dense.out_axis,
            spatial=frozen.dense.spatial,
            pixels=data.pixels.shape[1],
        ),
        memory=memory,
        module=fitted.module,
        prediction=head.prediction,
        predictive=head.predictive,
        scaling={
            "temperature": head.temperature,
            "strength": head.strength,
            "temperature_alone": fitted.scaling.temperature_alone,
        },
        family=_family(fitted),
        confidence="probs" if head.sureness is None else head.sureness.name,
        conformal=fitted.conformal,
        recalibration=options.recalibration if options.task == "regression" else None,
        quantile_levels=options.quantile_levels if options.task == "regression" else (),
        ood=fitted.ood,
        abstain=fitted.abstain,
        splits=data.split,
        data={**data.summary, "head_max_difference": differences},
        evaluation=dict(evaluation or {}),
        versions=versions(),
        notes=(*_promised(fitted, frozen), *_facts(fitted, frozen, options, data)),
    )
    files = {
        PREDICTOR: fused.model,
        HEAD: head_model,
        STATE: save_tensors(_state(fitted)),
        CONFORMAL: save_tensors({k: np.ascontiguousarray(v) for k, v in fitted.scores.items()}),
        REFERENCE: _reference_table(data),
        GOLDEN: golden_bytes(golden, answers),
        EXAMPLES: _examples(golden),
    }
    return write_bundle(out, manifest, files)


def _family(fitted: Fitted) -> FamilyRecord | None:
    """What was chosen after the temperature; None where nothing else was asked for."""
    if fitted.head.family is None and not fitted.gains:
        return None
    name = "temperature" if fitted.head.family is None else fitted.head.family.name
    return FamilyRecord(name=name, gains={g.name: (g.gain, g.low) for g in fitted.gains})


def _promised(fitted: Fitted, frozen: Frozen) -> tuple[str, ...]:
    """What the promises do not say."""
    if frozen.dense is None:
        given = fitted.conformal.given
        return NOTES if given is None else (OF_CELLS.format(given=given), *NOTES[1:])
    missed = any(g.kind == "missed" for g in fitted.conformal.guarantees)
    return (OF_MASKS if missed else OF_MAPS[0], *OF_MAPS[1:])


def _facts(fitted: Fitted, frozen: Frozen, options: FitOptions, data: Dataset) -> tuple[str, ...]:
    """What the opening of the model and its module left to be said."""
    said = list(frozen.notes)
    cells = fitted.head.cells
    if isinstance(cells, Cells) and cells.by != "group" and (rest := int((cells.of < 0).sum())):
        said.append(
            f"{rest} of {len(cells.of)} classes have too few calibration rows for a cluster: they "
            "take the threshold of all rows, and nothing is promised of them by themselves."
        )
    if frozen.phi is None:
        left = ", ".join(remaining_modules(frozen, options.task))
        said.append(f"A black box: of the modules and scores these work on it: {left}.")
    if fitted.head.module is not None and fitted.head.strength == 0.0:
        said.append(
            f"The calibration rows gave {fitted.module.name} no strength: what is served is the "
            "frozen model with scaling alone, and every epistemic part is zero."
        )
    elif fitted.head.prediction == "module":
        said.append(
            f"The label, or the mean, is that of {fitted.module.name}, not of the frozen model."
        )
    if among := data.summary.get("rows_among_training_rows"):
        said.append(
            f"{among:,} rows of the data are among the training rows too, by content: the figures "
            "flatter the model if that is no coincidence."
        )
    if fitted.module.settings.get("uncalibrated"):
        said.append(
            "The strength of the module's noise, or its prior, was chosen without labels; only "
            "scaling saw some."
        )
    return tuple(said)


def _memory(model: bytes, rows: Mapping[str, Array]) -> MemoryRecord | None:
    found = row_bytes(onnx.load_from_string(model), rows)
    if found is None:
        return None
    return MemoryRecord(row_bytes=found, values=sum(v[:1].size for v in rows.values()))


def _run(
    session: Any, memory: MemoryRecord | None, names: Sequence[str], rows: Mapping[str, Array]
) -> list[Array]:
    """Outputs of the fused graph, of as many rows at once as memory holds."""
    most = most_rows(None if memory is None else memory.row_bytes)
    return in_slices(lambda feed: session.run(list(names), dict(feed)), rows, most)


def _answers(run: Run, fused: Fused, rows: Mapping[str, Array]) -> dict[str, Array]:
    """Every field of the fused graph, by name."""
    names = [s.name for s in fused.outputs]
    made = run([fused.names[n] for n in names], rows)
    return dict(zip(names, made, strict=True))


def _check_end_to_end(
    head: Head, fused: Fused, run: Run, data: Dataset, dense: Layout | None
) -> None:
    """The fused graph on raw rows agrees with the float64 reference over the same rows' cached
    features, and its label is the frozen argmax where that is served; FitError naming the field
    where not."""
    got = _answers(run, fused, data.rows)
    want = reference(head, data.features.phi, data.features.z)
    if dense is not None:
        assert data.pixels is not None
        axes = {n: a for n, (_, a) in output_fields(head.task).items()}
        got = {n: taken(v, dense, axes[n], data.pixels) for n, v in got.items()}
    if fused.logits is not None and head.task == "classification":
        (logits,) = run([fused.logits], data.rows)
        if dense is not None and data.pixels is not None:
            logits = taken(logits, dense, "C", data.pixels)
        kept = np.array_equal(got["label"], logits.argmax(1))
        if head.prediction == "frozen" and not kept:
            raise FitError("the fused graph's label is not the frozen model's argmax")
    # A row's own weight, and with it its threshold, moves with another batch's rounding; the head
    # was checked on the very same features.
    moving = isinstance(head.cells, Weighted) and head.cells.by == "covariate"
    skipped = {"ood_pvalue", *(("set", "lower", "upper") if moving else ())}
    for name, value in got.items():
        if value.dtype.kind != "f" or name in skipped:
            continue
        if not np.isfinite(value[np.isfinite(want[name])]).all():
            raise FitError(f"the fused graph gives a {name} that is not finite")
        if not np.allclose(value, want[name], rtol=END_TO_END, atol=END_TO_END):
            worst = float(np.nanmax(np.abs(value - want[name])))
            raise FitError(f"the fused graph's {name} is off by {worst:.1e} from its reference")
    for name, margin in mask_margins(head, want).items():
        asked = name in got and name not in skipped
        if asked and ((got[name] != want[name]) & (margin > END_TO_END)).any():
            raise FitError(f"the fused graph's {name} is not its reference's")


def _state(fitted: Fitted) -> dict[str, Array]:
    """Every tensor of the head, float64 as fitted, under names that say what they are."""
    head = fitted.head
    tensors: dict[str, Array] = {}
    if head.module is not None:
        tensors |= {f"module/{k}": v for k, v in head.module[1].tensors.items()}
    if head.ood is not None:
        for m in head.ood.members:
            tensors |= {f"ood/{m.name}/{k}": v for k, v in m.state.tensors.items()}
            if m.ranks is not None:
                tensors |= {f"ood/{m.name}/{k}": v for k, v in m.ranks.tensors().items()}
        tensors |= {"ood/table": head.ood.table, "ood/pvalues": head.ood.pvalues}
    for key in ("eps", "noise", "quantile_factors"):
        if (value := getattr(head, key)) is not None:
            tensors[key] = value
    for part in ("family", "sureness"):
        if (family := getattr(head, part)) is not None:
            tensors |= {f"{part}/{k}": v for k, v in family.tensors.items()}
    tensors |= {f"interval/{k}": v for k, v in head.interval.tensors.items()}
    tensors["scaling"] = np.asarray([head.temperature, head.strength])
    return {k: np.ascontiguousarray(v) for k, v in tensors.items()}


def _reference_table(data: Dataset) -> bytes:
    columns: dict[str, Any] = {
        "role": pa.array(np.asarray(data.roles, dtype=object), pa.string()),
        "row_hash": pa.array(np.asarray(data.hashes, np.uint64)),
        "split_key": pa.array(np.asarray(data.keys, np.uint64)),
    }
    columns |= {k: pa.array(np.asarray(v, np.float64)) for k, v in data.reference.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def golden_bytes(rows: Mapping[str, Array], answers: Mapping[str, Array]) -> bytes:
    """The file of golden rows: what goes into a bundle's graph, and what comes out."""
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
    inputs = {k: v[: 2 if v.ndim == 2 else 1].tolist() for k, v in rows.items()}
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
