"""One module on one split of cached rows: its figures, and a loss for each test row."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.comparison.candidates import ALONE, Candidate, options_of
from calibration.conformal.intervals import bounds, interval_scores
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts, Scale
from calibration.fit_thresholds import Fitted, run_head
from calibration.head import Head
from calibration.material import DEFAULT_SPLIT, ROLES, Material, parts_of, split
from calibration.metrics.calibration_error import debiased_ece
from calibration.metrics.proper import brier_score, gaussian_crps
from calibration.metrics.ranking import auroc, risk_coverage
from calibration.quality import classification_totals
from calibration.scaling import student_nll
from calibration.strange import Strange
from posthoc.contract import F64, I64, Array, Features, FitError
from posthoc.folds import log_loss_of_probs

LOSSES = {"classification": ("nll", "brier"), "regression": ("nll", "crps")}


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate on one split. ``rows`` are the test rows' places in the cache and ``losses`` a
    number for each (N) by name; ``error`` is why there are none. ``head`` is kept where asked.
    ``others`` are the figures of further labelled rows."""

    candidate: Candidate
    seed: int
    figures: dict[str, float] = field(default_factory=dict)
    rows: I64 | None = None
    losses: dict[str, F64] = field(default_factory=dict)
    seconds: float = 0.0
    head: Head | None = None
    error: str | None = None
    others: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(
    material: Material,
    method: str,
    scalings: Sequence[Scale],
    seed: int,
    options: FitOptions,
    *,
    outside: Mapping[str, Features] | None = None,
    labelled: Sequence[Strange] = (),
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
    keep_head: bool = False,
) -> list[Measured]:
    """``method`` with each scaling on the split of ``seed``. The module is fitted once.

    ``outside`` are strange rows by name, on which the module's own uncertainty is held against
    that of test rows; ``labelled`` are sets beside the test rows, which have figures of their own.
    A fit that fails is a `Measured` with its error.
    """
    roles = split(material, seed, fractions)
    parts, test = parts_of(material, roles)
    rows = np.asarray(material.usable[roles == ROLES.index("test")], np.int64)
    beside = {s.name: s.beside(rows) for s in labelled}
    found: list[Measured] = []
    module: Fitted | None = None
    spent = 0.0
    for scaling in scalings:
        candidate = Candidate(method, scaling)
        started = time.perf_counter()
        try:
            fitted = _fit(material, parts, candidate, options, seed, module)
        except FitError as e:
            found.append(Measured(candidate, seed, error=str(e)))
            continue
        seconds = time.perf_counter() - started
        if module is None:
            module, spent = fitted, seconds
        else:
            seconds += spent  # the module's own fit was before it
        figures, losses = figures_of(fitted, test, outside or {})
        head = fitted.head if keep_head else None
        others = {k: figures_of(fitted, r, {})[0] for k, r in beside.items() if len(r)}
        found.append(Measured(candidate, seed, figures, rows, losses, seconds, head, others=others))
    return found


def _fit(
    material: Material,
    parts: Parts,
    candidate: Candidate,
    options: FitOptions,
    seed: int,
    before: Fitted | None,
) -> Fitted:
    """The module of another scaling takes the place of its own fit."""
    posterior = None
    if before is not None and candidate.method != ALONE:
        posterior = before.head.module
    return fit_head(
        material.linear,
        parts,
        options_of(candidate, options, seed),
        posterior,
        None if posterior is not None else material.train,
    )


def figures_of(
    fitted: Fitted, test: Features, outside: Mapping[str, Features]
) -> tuple[dict[str, float], dict[str, F64]]:
    """(figures of the test rows, losses N by name)."""
    out = run_head(fitted.head, test)
    classes = fitted.head.task == "classification"
    figures, losses = (_classification if classes else _regression)(fitted, test, out)
    strange = [run_head(fitted.head, rows) for rows in outside.values()]
    if strange:
        told = [auroc(uncertainty(out), uncertainty(s)) for s in strange]
        figures["ood_auroc"] = float(np.mean(told))
    return figures, losses


def _classification(
    fitted: Fitted, test: Features, out: Mapping[str, Array]
) -> tuple[dict[str, float], dict[str, F64]]:
    p, y = out["probs"].astype(np.float64), np.asarray(test.y, np.int64)
    label, row = out["label"], np.arange(len(test))
    losses = {"nll": log_loss_of_probs(p, y), "brier": brier_score(p, y)}
    figures = {
        "nll": float(losses["nll"].mean()),
        "ece": debiased_ece(classification_totals(p, label, y)),
        "brier": float(losses["brier"].mean()),
        "accuracy": float((label == y).mean()),
        "aurc": risk_coverage(out["confidence"], label != y).aurc,
    }
    g = fitted.conformal.guarantees[0]
    if g.threshold is not None:
        sets = out["set_scores"] <= g.threshold
        figures["coverage"] = float(sets[row, y].mean())
        figures["set_size"] = float(sets.sum(1).mean())
    return figures, losses


def _regression(
    fitted: Fitted, test: Features, out: Mapping[str, Array]
) -> tuple[dict[str, float], dict[str, F64]]:
    """The likelihood is Student-t where the module's predictive is."""
    y = np.asarray(test.y, np.float64)
    error = y - out["mean"].astype(np.float64)
    std = out["std"].astype(np.float64)
    df = 1e300 if fitted.head.module is None else fitted.head.module[1].settings.get("df", 1e300)
    nll = student_nll(error, std**2, float("inf") if df > 1e9 else float(df)).mean(1)
    losses = {"nll": nll, "crps": gaussian_crps(error, std).mean(1)}
    figures = {
        "nll": float(nll.mean()),
        "crps": float(losses["crps"].mean()),
        "rmse": float(np.sqrt((error**2).mean())),
    }
    g = fitted.conformal.guarantees[0]
    if g.threshold is not None:
        scores = interval_scores(fitted.head.interval, y, out["mean"], out["std"])
        q = np.full((1, 1), g.threshold)
        lower, upper = bounds(fitted.head.interval, q, out["mean"], out["std"])
        figures["coverage"] = float((scores <= g.threshold).mean())
        if np.isfinite(width := float((upper - lower).mean())):
            figures["width"] = width
    return figures, losses


def uncertainty(out: Mapping[str, Array]) -> Array:
    """What a module itself says of strangeness: its epistemic share, else all of it."""
    for name in ("epistemic", "entropy"):
        if name in out:
            return out[name]
    return np.asarray(out["epistemic_std" if "epistemic_std" in out else "std"].max(1))
