"""A calibrated head as ONNX: ``head.onnx`` over (phi, z), ``predictor.onnx`` over the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.conformal.cells import UNKNOWN, Cells
from calibration.conformal.scores import nearest, page
from calibration.head import Head, emit, limit, reference
from calibration.shift.weighted import Weighted
from calibration.threshold import pvalues
from posthoc import pixels
from posthoc.contract import Array, FitError, ModelError, TensorSpec, output_fields
from posthoc.graph import HEAD_OPSET, Fragment, append, standalone, taken_names
from posthoc.logits import Link, emit_link
from posthoc.pixels import Layout
from posthoc.runtime import open_session

if TYPE_CHECKING:
    from posthoc.frozen import Frozen

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Fused:
    """A compiled predictor: bytes, our outputs by field, the field -> tensor name map, the name of
    the output that holds the frozen logits before any calibration (a regression: the frozen mean,
    where it is not the one that is served), and the inputs that a row may have beside its own."""

    model: bytes
    outputs: tuple[TensorSpec, ...]
    names: dict[str, str]
    logits: str | None
    optional: tuple[TensorSpec, ...] = ()


def field_specs(
    head: Head, present: Mapping[str, str], dense: Layout | None = None
) -> tuple[TensorSpec, ...]:
    """Specs of the fields that ``present`` holds, in the order of design; ``dense``: as maps."""
    quantiles = 0 if head.quantile_factors is None else head.quantile_factors.shape[1]
    size = {"C": head.width, "K": head.width, "Q": quantiles}

    def shape(axes: str) -> tuple[int, ...]:
        tail = tuple(size[a] for a in axes)
        return tail if dense is None else (*dense.shape(*tail[:1] or (0,)), *tail[1:])

    return tuple(
        TensorSpec(name=n, dtype=dtype, shape=(-1, *shape(axes)))
        for n, (dtype, axes) in output_fields(head.task).items()
        if n in present
    )


def compile_head(head: Head, *, scores: bool = False) -> bytes:
    """``head.onnx``: inputs phi (N×D, if used) and z (N×C); ``scores`` adds ``set_scores``."""
    g = Fragment(HEAD_OPSET)
    phi = None if head.features is None else g.input("phi", "float32", ["N", head.features])
    z = g.input("z", "float32", ["N", head.width])
    made = emit(head, g, phi, z, scores=scores)
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in field_specs(head, made):
        g.publish(made[spec.name], spec.name)
        outputs[spec.name] = (spec.dtype, spec.shape)
    if "set_scores" in made:
        g.publish(made["set_scores"], "set_scores")
        outputs["set_scores"] = ("float32", (-1, head.width))
    return standalone(g, outputs)


def compile_predictor(
    head: Head,
    frozen: bytes,
    *,
    opset: int,
    phi: str | None,
    z: str,
    link: Link = "identity",
    dense: Layout | None = None,
) -> Fused:
    """``predictor.onnx``: the frozen graph with the head behind its tensors ``phi`` and ``z``.

    Where these are maps (``dense``), the head runs over their pixels and its fields become maps in
    the layout of the model's own output.

    On a clash with a name of the frozen graph, our output takes the prefix ``uq_``. Raises
    ModelError when the model has a tensor named like a run-time input.
    """
    taken = taken_names(frozen)
    prefix = "uq/"
    while any(name.startswith(prefix) for name in taken):
        prefix = "uq_" + prefix
    g = Fragment(opset, prefix)
    phi = phi if head.features is not None else None
    sizes = ""
    if dense is not None:
        sizes = pixels.emit_sizes(g, z, dense.axis, len(dense.spatial))
        z = pixels.emit_rows(g, z, dense.axis)
        phi = None if phi is None else pixels.emit_rows(g, phi, dense.phi_axis)
    logits = emit_link(g, z, link)

    def per_row(name: str) -> str:
        return name if dense is None else pixels.emit_per_row(g, name, sizes, len(dense.spatial))

    made = emit(head, g, phi, logits, per_row=per_row)
    for added in g.inputs:
        if added.name in taken:
            raise ModelError(
                f"the frozen model has a tensor {added.name!r}, which is the name of an input that "
                "the fused graph adds; rename it in the model"
            )
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    names: dict[str, str] = {}
    specs, rows = field_specs(head, made, dense), field_specs(head, made)
    for spec, row in zip(specs, rows, strict=True):
        name = free_name(spec.name, taken)
        tensor = made[spec.name]
        if dense is not None:
            tensor = pixels.emit_maps(g, tensor, sizes, dense, row.shape[1:])
        g.publish(tensor, name)
        names[spec.name] = name
        outputs[name] = (spec.dtype, spec.shape)
    kept = None
    if head.task == "classification" or head.prediction == "module":
        kept = free_name("uq_logits" if head.task == "classification" else "uq_mean", taken)
        shape: tuple[int, ...] = (head.width,)
        if dense is not None:
            logits = pixels.emit_maps(g, logits, sizes, dense, shape)
            shape = dense.shape(head.width)
        g.op("Identity", logits, out=kept)
        outputs[kept] = ("float32", (-1, *shape))
    return Fused(append(frozen, g, outputs), specs, names, kept, optional_inputs(head))


def behind(head: Head, frozen: Frozen, link: Link = "identity") -> Fused:
    """`compile_predictor` for an opened model."""
    return compile_predictor(
        head,
        frozen.model,
        opset=frozen.opset,
        phi=frozen.phi,
        z=frozen.z,
        link=link,
        dense=frozen.dense,
    )


def optional_inputs(head: Head) -> tuple[TensorSpec, ...]:
    """What a row may say of itself: its group, and the u of a randomised score."""
    group = isinstance(head.cells, Cells) and head.cells.by == "group"
    asked = (("group", "int64", group), ("u", "float32", head.randomised))
    return tuple(TensorSpec(name=n, dtype=d, shape=(-1,)) for n, d, is_asked in asked if is_asked)


def free_name(name: str, taken: set[str]) -> str:
    """``name``, with as many prefixes ``uq_`` as it takes to be nobody else's."""
    while name in taken:
        name = "uq_" + name
    return name


def check_head(head: Head, model: bytes, phi: Array | None, z: Array) -> dict[str, float]:
    """Largest difference of ``head.onnx`` from the float64 reference on real rows, by field.

    Differences are absolute up to one and relative beyond. Masks may differ only where their score
    lies within the tolerance of its threshold; p-values must be the table's own for the graph's
    score. Raises FitError beyond 1e-5, naming the field.
    """
    session = open_session(model)
    feed = {"z": np.asarray(z, np.float32)}
    if head.features is not None:
        feed["phi"] = np.asarray(phi, np.float32)
    beside = _beside(head, len(z))
    names = [o.name for o in session.get_outputs()]
    got = dict(zip(names, session.run(names, feed | beside), strict=True))
    want = reference(head, phi, z, **beside)
    steady = steady_rows(head, phi, z)
    worst: dict[str, float] = {}
    for name, value in got.items():
        if value.dtype.kind != "f" or name == "ood_pvalue":
            continue
        if name in ("lower", "upper"):
            value, want[name] = value[steady], want[name][steady]
        finite = np.isfinite(want[name])
        if not np.isfinite(value[finite]).all():
            raise FitError(f"the compiled head gives a {name} that is not finite")
        if not np.array_equal(value[~finite], want[name][~finite]):
            raise FitError(f"the compiled head's {name} is finite where it is not in float64")
        scale = np.maximum(1.0, np.abs(want[name]))
        if name in ("lower", "upper", "quantiles"):
            # Of two numbers that may cancel, float32 keeps the digits of the larger.
            terms = np.abs(want["mean"]) + want["std"]
            terms = terms if name == "quantiles" else terms[steady]
            scale = np.maximum(scale, terms if name != "quantiles" else terms[..., None])
        scale = scale[finite]
        off = np.abs(value[finite] - want[name][finite])
        worst[name] = float((off / scale).max(initial=0.0))
        if worst[name] > TOLERANCE:
            raise FitError(f"the compiled head's {name} is off by {worst[name]:.1e} from float64")
    if "label" in got:
        sure: Array = np.ones(len(z), bool)
        if head.prediction == "module":
            top = np.sort(want["probs"], axis=1)[:, -2:]
            sure = top[:, 1] - top[:, 0] > TOLERANCE
        if (got["label"] != want["label"])[sure].any():
            whose = "frozen model" if head.prediction == "frozen" else "module"
            raise FitError(f"the compiled head changes a label of the {whose}")
    for name, margin in mask_margins(head, want).items():
        rows = steady if name == "set" else slice(None)
        if name in got and ((got[name] != want[name]) & (margin > TOLERANCE))[rows].any():
            raise FitError(
                f"the compiled head's {name} differs from float64 away from its threshold"
            )
    if head.ood is not None:
        table, p = head.ood.table.astype(np.float32), head.ood.pvalues.astype(np.float32)
        if not np.array_equal(got["ood_pvalue"], pvalues(table, p, got["ood_score"]).astype("f4")):
            raise FitError("the compiled head's ood_pvalue is not its table's")
    return worst


def _beside(head: Head, n: int) -> dict[str, Array]:
    """Run-time inputs for n rows: every group in turn, and one that is none; u all over [0, 1)."""
    found: dict[str, Array] = {}
    if isinstance(head.cells, Cells) and head.cells.by == "group":
        found["group"] = np.resize(np.append(head.cells.of, UNKNOWN), n).astype(np.int64)
    if head.randomised:
        found["u"] = (np.arange(n) % 8 / 8).astype(np.float32)
    return found


def steady_rows(head: Head, phi: Array | None, z: Array) -> Array:
    """Rows whose threshold does not change with rounding: a weight that depends on the row lands
    between two ranks now and then."""
    if not isinstance(head.cells, Weighted) or head.cells.by != "covariate":
        return np.ones(len(z), bool)
    level = float(np.asarray(head.q_hat)[0])
    low, high = (head.cells.of_rows(level * (1 + s * TOLERANCE), z, phi) for s in (-1, 1))
    return np.asarray(low == high)


def mask_margins(head: Head, want: Mapping[str, Array]) -> dict[str, Array]:
    """How far each mask's score lies from its threshold, relative beyond one."""
    found: dict[str, Array] = {}
    if "set" in want:
        with np.errstate(invalid="ignore"):  # a score and a threshold may both be infinite
            found["set"] = np.abs(want["set_scores"] - want["set_thresholds"])
        if page(head.conformal).RANKS:
            found["set"] = np.minimum(found["set"], nearest(want["probs"]))
    if head.ood is not None:
        score = want["ood_score"]
        found["ood"] = np.abs(score - head.ood.threshold) / np.maximum(1.0, np.abs(score))
    if "abstain" in want and head.task == "classification":
        found["abstain"] = np.abs(want["confidence"] - limit(head.abstain))
    return found
