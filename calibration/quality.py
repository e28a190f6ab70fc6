"""The few figures of a fit on its own test rows, for the manifest and the terminal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from calibration.bundle import Guarantee
from calibration.conformal.cells import UNKNOWN, Cells, group_index, named_codes
from calibration.conformal.intervals import bounds, interval_scores, signed_residuals
from calibration.fit_thresholds import Fitted, run_head
from calibration.head import row_thresholds
from calibration.metrics.totals import (
    ClassificationTotals,
    RegressionTotals,
    level_name,
    update_classification,
    update_regression,
)
from calibration.recalibration import TRANSFORMS, base_of, log_density
from calibration.shift.weighted import Weighted
from posthoc.contract import Array, Features
from posthoc.links import softmax

FEWEST = 10  # test rows of a class or group whose coverage is told


def classification_totals(p: Array, label: Array, y: Array) -> ClassificationTotals:
    """Additive statistics of probabilities N×C of which ``label`` is what was said."""
    confidence = p[np.arange(len(p)), label]
    return update_classification(
        ClassificationTotals(), confidence=confidence, label=label, y=y, probs=p
    )


def summary(
    fitted: Fitted, test: Features, groups: Array | None = None, u: Array | None = None
) -> dict[str, Any]:
    """Accuracy (or RMSE), NLL, ECE and coverage on the test rows, frozen beside hedged.

    Of a dense model the rows are the pixels drawn from the test images, ``rows`` counts images and
    a level has the promised figure: the mean over images of the share of uncovered pixels, or of
    those of a class that its mask misses.
    """
    assert test.y is not None
    if len(test) == 0:
        return {}
    group = None if groups is None else codes_of(fitted, groups)
    out = run_head(fitted.head, test, group=group, u=u)
    levels = {}
    per = _pixels(fitted)
    if fitted.head.task == "classification":
        y = np.asarray(test.y, np.int64)
        label, said = out["label"], test.z.argmax(1)
        rows = np.arange(len(y))
        for g in fitted.conformal.guarantees:
            q = _thresholds(fitted, g, group, test)
            if g.kind == "missed":
                c = int(fitted.conformal.settings["mask"])
                mask = out["set_scores"][:, c] <= q[:, 0]
                levels[level_name(g.alpha)] = _missed(mask, y == c, per or 1)
                continue
            sets = out["set_scores"] <= q
            weights = _weights(fitted, test, y)
            levels[level_name(g.alpha)] = {
                **_covered(sets[rows, y], g.alpha, per),
                **_expected(sets[rows, y], weights),
                **_least_covered(sets[rows, y], y if group is None else group, fitted),
                "mean_set_size": float(sets.sum(1).mean()),
                "empty": float((sets.sum(1) == 0).mean()),
            }
        return {
            "rows": len(test) // (per or 1),
            "frozen": _classification(classification_totals(softmax(test.z), said, y)),
            "hedged": _classification(classification_totals(out["probs"], label, y)),
            "levels": levels,
        }
    y = np.asarray(test.y, np.float64)
    totals = update_regression(RegressionTotals(), mean=out["mean"], std=out["std"], y=y)
    score = interval_scores(fitted.head.interval, y, out["mean"], out["std"])
    for g in fitted.conformal.guarantees:
        q = _thresholds(fitted, g, group, test)
        inside = score <= np.broadcast_to(q, (len(y), 1))[:, 0]
        lower, upper = bounds(fitted.head.interval, q, out["mean"], out["std"])
        width = float((upper - lower).mean())
        levels[level_name(g.alpha)] = {
            **_covered(inside, g.alpha, per),
            **_expected(inside, _weights(fitted, test, y[:, 0])),
            **({} if group is None else _least_covered(inside, group, fitted)),
            **({"mean_width": width} if math.isfinite(width) else {}),
        }
    hedged = {"rmse": totals.rmse, "crps": totals.crps, "nll": totals.log_loss}
    if TRANSFORMS in fitted.scores:
        signed, base = signed_residuals(y, out["mean"], out["std"]), base_of(fitted.head)
        found = log_density(base, fitted.scores[TRANSFORMS], signed, out["std"])
        hedged["nll_recalibrated"] = -float(found.mean())
    return {
        "rows": len(test) // (per or 1),
        "frozen": {"rmse": float(np.sqrt(((y - test.z) ** 2).mean()))},
        "hedged": hedged,
        "levels": levels,
    }


def codes_of(fitted: Fitted, groups: Array) -> Array:
    """The codes of a column of groups, as the fitted head knows them; UNKNOWN for the others."""
    cells = fitted.head.cells
    if not isinstance(cells, Cells) or cells.by != "group":
        return np.full(len(groups), UNKNOWN)
    return named_codes(groups, cells.of, cells.names)


def _thresholds(fitted: Fitted, g: Guarantee, group: Array | None, test: Features) -> Array:
    """Thresholds of a level that broadcast with scores of rows."""
    cells = fitted.head.cells
    if cells is None:
        return np.full((1, 1), np.inf if g.threshold is None else g.threshold)
    if isinstance(cells, Weighted):
        q = cells.thresholds(g.alpha)
        return row_thresholds(fitted.head, q, test.z, None, test.phi).astype(np.float32)
    q = cells.thresholds(g.alpha).astype(np.float32)
    if cells.by != "group":
        return q[None]
    assert group is not None
    return np.asarray(q[group_index(cells.of, group)][:, None])


def _weights(fitted: Fitted, test: Features, y: Array) -> Array | None:
    """What test rows weigh among production rows; None without a shift."""
    cells = fitted.head.cells
    if not isinstance(cells, Weighted):
        return None
    if cells.ratio is not None:
        return cells.ratio.weights(test.z, test.phi)
    return cells.own[y] if fitted.head.task == "classification" else None


def _expected(inside: Array, weights: Array | None) -> dict[str, float]:
    """Coverage of production rows as the weights have it."""
    if weights is None:
        return {}
    return {"coverage_in_production": float(weights @ inside / weights.sum())}


def _least_covered(inside: Array, cell: Array, fitted: Fitted) -> dict[str, float]:
    """Coverage of the class or group that has the least, of those with ten test rows at least."""
    if not isinstance(fitted.head.cells, Cells):
        return {}
    found, index, count = np.unique(cell, return_inverse=True, return_counts=True)
    shares = np.bincount(index, inside) / count
    shares = shares[(count >= FEWEST) & (found != UNKNOWN)]
    return {"least_covered": float(shares.min())} if len(shares) else {}


def _pixels(fitted: Fitted) -> int | None:
    """Pixels drawn from an image; None where rows are no pixels."""
    if all(g.kind == "coverage" for g in fitted.conformal.guarantees):
        return None
    key = "set" if fitted.head.task == "classification" else "interval"
    return int(fitted.scores[key].shape[1])


def _covered(inside: Array, alpha: float, per: int | None) -> dict[str, float]:
    """Coverage of rows; of images the share of uncovered pixels, and how many have over alpha."""
    if per is None:
        return {"coverage": float(inside.mean())}
    shares = 1 - inside.reshape(-1, per).mean(axis=1)
    return {
        "uncovered_pixels": float(shares.mean()),
        "images_above": float((shares > alpha).mean()),
    }


def _missed(mask: Array, shown: Array, per: int) -> dict[str, float]:
    """Mean over images of the share of a class's drawn pixels outside its mask, where any were."""
    count = shown.reshape(-1, per).sum(axis=1)
    outside = (shown & ~mask).reshape(-1, per).sum(axis=1)
    some = count > 0
    found = {"images_with_class": float(some.sum()), "mask_share": float(mask.mean())}
    if some.any():
        found = {"missed_pixels": float((outside[some] / count[some]).mean()), **found}
    return found


def _classification(totals: ClassificationTotals) -> dict[str, float]:
    return {
        "accuracy": totals.accuracy,
        "nll": totals.log_loss,
        "ece": totals.ece,
        "brier": totals.brier,
    }
