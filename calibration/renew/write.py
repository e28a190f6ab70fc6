"""A renewed bundle on disk: the new head behind the same frozen graph, checked as a fit's is."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import save as save_tensors

from calibration.assemble import golden_bytes, versions
from calibration.bundle import (
    CONFORMAL,
    EXAMPLES,
    GOLDEN,
    HEAD,
    PREDICTOR,
    REFERENCE,
    STATE,
    Bundle,
    FamilyRecord,
    RenewalRecord,
    write_bundle,
)
from calibration.compile import TOLERANCE, check_head, compile_head, compile_predictor
from calibration.head import Head, row_thresholds
from calibration.renew.measure import Figures
from calibration.renew.opened import Opened
from calibration.renew.reference import renewed_reference
from calibration.renew.renewal import Renewal
from calibration.renew.rows import drawn
from calibration.renew.thresholds import scores_of
from calibration.renew.told import stamp
from posthoc.contract import Array, BundleError, FitError
from posthoc.links import entropy
from posthoc.runtime import open_session


def next_version(version: str) -> str:
    """The version after one: its last number and one."""
    found = re.search(r"(\d+)(?=\D*$)", version)
    if found is None:
        return f"{version}.2"
    return f"{version[: found.start()]}{int(found[1]) + 1}{version[found.end() :]}"


def version_at(out: Path, bundle: Bundle, asked: str | None) -> str:
    """The version of a bundle at ``out``: the one asked for; that of its folder, where that lies
    in one of the model's name, as a root has it; or the next. Raises BundleError for the old one:
    answers, labels and metrics tell versions apart by it."""
    m = bundle.manifest
    found = asked or (out.name if out.absolute().parent.name == m.name else next_version(m.version))
    if found == m.version:
        raise BundleError(
            f"version {found!r} of {m.name} is the bundle that is renewed: give another --version"
        )
    return found


def check_out(out: Path) -> None:
    """BundleError where there is something at ``out``."""
    if out.exists():
        raise BundleError(f"{out} exists already; a bundle is immutable, give another -o")


def write_renewed(found: Renewal, out: Path, version: str) -> Bundle:
    """Compile, check on the golden rows and write the renewed bundle.

    Raises FitError when head or predictor disagree with the float64 reference or the frozen answer
    would change, BundleError when ``out`` exists.
    """
    check_out(out)
    opened, made, head = found.opened, found.made, found.made.head
    m, old = opened.manifest, opened.bundle
    head_model = compile_head(head)
    differences = check_head(head, head_model, opened.features.phi, opened.features.z)
    fused = compile_predictor(
        head, opened.frozen, opset=opened.opset, phi=opened.phi, z=opened.z, link=opened.link
    )
    names = [fused.names[s.name] for s in fused.outputs]
    made_now = open_session(fused.model).run(names, opened.rows)
    answers = dict(zip((s.name for s in fused.outputs), made_now, strict=True))
    _check_end_to_end(opened, head, head_model, answers)
    comparison, family = found.comparison, m.family
    if head.family is not None and (family is None or family.name != head.family.name):
        family = FamilyRecord(name=head.family.name)
    manifest = m.model_copy(
        update={
            "version": version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "outputs": fused.outputs,
            "optional_inputs": fused.optional,
            "output_names": fused.names,
            "frozen": m.frozen.model_copy(update={"logits": fused.logits}),
            "scaling": {**m.scaling, "temperature": head.temperature},
            "family": family,
            "conformal": made.conformal,
            "abstain": made.abstain,
            "data": {**m.data, "head_max_difference": differences},
            "evaluation": {
                "rows": comparison.rows,
                "before": comparison.before.means,
                "hedged": comparison.after.means,
                "levels": _levels(comparison.after),
            },
            "versions": versions(),
            "notes": (*(n for n in m.notes if not n.startswith("Renewed")), *found.notes),
            "renewal": RenewalRecord(
                identity=old.identity,
                version=m.version,
                since=stamp(found.window.since),
                until=stamp(found.window.until),
                served=found.window.served,
                labelled=found.window.labelled,
                seed=found.seed,
                rows=found.parts,
                factor=1.0 if found.factor is None else found.factor.value,
                renewed=found.renewed,
                kept=found.kept,
                before=comparison.before.as_dict(),
                after=comparison.after.as_dict(),
            ),
        }
    )
    files = {
        PREDICTOR: fused.model,
        HEAD: head_model,
        STATE: save_tensors(_state(opened, head)),
        CONFORMAL: save_tensors(_scores(found)),
        REFERENCE: renewed_reference(old, found.conformal.keys, _reference(found)),
        GOLDEN: golden_bytes(opened.rows, answers),
        EXAMPLES: old.files[EXAMPLES],
    }
    return write_bundle(out, manifest, files)


def _check_end_to_end(
    opened: Opened, head: Head, head_model: bytes, answers: dict[str, Array]
) -> None:
    """The fused graph answers as its head alone does, which agrees with the reference, and says
    what the frozen model said before."""
    feed = {"z": np.asarray(opened.features.z, np.float32)}
    if head.features is not None:
        feed["phi"] = np.asarray(opened.features.phi, np.float32)
    session = open_session(head_model)
    alone = session.run(list(answers), feed)
    for (name, value), want in zip(answers.items(), alone, strict=True):
        if not np.allclose(value, want, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise FitError(f"the fused graph's {name} is not that of its head")
    with np.load(io.BytesIO(opened.bundle.files[GOLDEN]), allow_pickle=False) as golden:
        said = "label" if head.task == "classification" else "mean"
        before = golden[f"out/{said}"]
    same = before.dtype.kind == "i" and np.array_equal(answers[said], before)
    if not same and not (
        said == "mean" and np.allclose(answers[said], before, rtol=1e-3, atol=1e-4)
    ):
        raise FitError(f"the renewed graph changes the {said} of a golden row")


def _state(opened: Opened, head: Head) -> dict[str, Array]:
    """The tensors of the bundle, with those of the new scaling in their place."""
    again = ("family/", "sureness/", "interval/")
    kept = {k: v for k, v in opened.bundle.tensors(STATE).items() if not k.startswith(again)}
    for part in ("family", "sureness"):
        if (family := getattr(head, part)) is not None:
            kept |= {f"{part}/{k}": v for k, v in family.tensors.items()}
    kept |= {f"interval/{k}": v for k, v in head.interval.tensors.items()}
    if head.quantile_factors is not None:
        kept["quantile_factors"] = head.quantile_factors
    kept["scaling"] = np.asarray([head.temperature, head.strength])
    return {k: np.ascontiguousarray(v) for k, v in kept.items()}


def _scores(found: Renewal) -> dict[str, Array]:
    """The new conformal scores, beside the old ones of the out-of-distribution score."""
    former = found.opened.bundle.conformal_scores
    own = dict(found.made.scores)
    if "ood" in former:
        own["ood"] = former["ood"]
    return {k: np.ascontiguousarray(v) for k, v in own.items()}


def _reference(found: Renewal) -> dict[str, Array]:
    """What live traffic is held against, of the conformal rows as they are served now."""
    rows, head = found.conformal, found.made.head
    if rows.std is not None:
        return {"std": rows.std.mean(axis=1)}
    if rows.probs is None or rows.confidence is None:
        return {}
    q = row_thresholds(head, head.q_hat, rows.probs, rows.group, None).astype(np.float32)
    q = np.broadcast_to(q, rows.probs.shape)
    size = np.empty(len(rows))
    for part, s in scores_of(head, rows, drawn(rows, found.seed)):
        size[part] = (s <= q[part]).sum(1)
    log_p = np.log(np.maximum(rows.probs.astype(np.float64), np.finfo(np.float32).tiny))
    return {"confidence": rows.confidence, "entropy": entropy(log_p), "set_size": size}


def _levels(figures: Figures) -> dict[str, dict[str, float]]:
    size = "mean_set_size" if "accuracy" in figures.means else "mean_width"
    return {
        v.level: {"coverage": v.coverage, **({} if v.size is None else {size: v.size})}
        for v in figures.levels
    }
