"""The few figures of a fit on its own test rows, for the manifest and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
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
    merge,
    update_classification,
    update_regression,
)
from calibration.recalibration import TRANSFORMS, base_of, log_density
from calibration.shift.weighted import Weighted
from posthoc.contract import Array, Features
from posthoc.folds import Mapper, each
from posthoc.links import softmax
from posthoc.rows import Share, join

Totals = ClassificationTotals | RegressionTotals
Sums = dict[str, Array]  # named numbers, or one for each cell, to be added up over rows
FEWEST = 10  # test rows of a class or group whose coverage is told


def classification_totals(p: Array, label: Array, y: Array) -> ClassificationTotals:
    """Additive statistics of probabilities N×C of which ``label`` is what was said."""
    confidence = p[np.arange(len(p)), label]
    return update_classification(
        ClassificationTotals(), confidence=confidence, label=label, y=y, probs=p
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Some test rows: what reads them, the groups they are in and their u for randomised scores.
    The drawn pixels of an image are together."""

    rows: Share
    groups: Array | None = None
    u: Array | None = None


@dataclass(frozen=True, slots=True)
class _Measured:
    """Sums over test rows: of the frozen model, of the fitted head, and named ones of each level
    and of the rest."""

    frozen: Totals
    hedged: Totals
    levels: dict[str, Sums]
    rest: Sums


def summary(
    fitted: Fitted, tested: Sequence[Piece], mapper: Mapper | None = None
) -> dict[str, Any]:
    """Accuracy (or RMSE), NLL, ECE and coverage on the test rows, frozen beside hedged. Every
    figure is made of sums, which the workers of ``mapper`` take over a part of the rows each.

    Of a dense model the rows are the pixels drawn from the test images, ``rows`` counts images and
    a level has the promised figure: the mean over images of the share of uncovered pixels, or of
    those of a class that its mask misses.
    """
    found = [m for m in each(mapper, partial(_measure, fitted), tested) if m is not None]
    if not found:
        return {}
    whole = reduce(_merged, found)
    told = _told_classification if fitted.head.task == "classification" else _told_regression
    return {
        "rows": int(whole.rest["rows"]) // (_pixels(fitted) or 1),
        **told(whole),
        "levels": {name: _told_level(sums) for name, sums in whole.levels.items()},
    }


def _told_classification(whole: _Measured) -> dict[str, Any]:
    return {"frozen": _classification(whole.frozen), "hedged": _classification(whole.hedged)}


def _told_regression(whole: _Measured) -> dict[str, Any]:
    frozen, totals, rest = whole.frozen, whole.hedged, whole.rest
    assert isinstance(frozen, RegressionTotals) and isinstance(totals, RegressionTotals)
    hedged = {"rmse": totals.rmse, "crps": totals.crps, "nll": totals.log_loss}
    if "densities" in rest:
        hedged["nll_recalibrated"] = -float(rest["log_density"] / rest["densities"])
    return {"frozen": {"rmse": frozen.rmse}, "hedged": hedged}


def _told_level(sums: Sums) -> dict[str, float]:
    """The figures of a level from its sums."""
    if "pixels" in sums:
        told = {"images_with_class": float(sums["shown"])}
        told["mask_share"] = float(sums["mask"] / sums["pixels"])
        if sums["shown"]:
            told = {"missed_pixels": float(sums["missed"] / sums["shown"]), **told}
        return told
    if "images" in sums:
        told = {
            "uncovered_pixels": float(sums["uncovered"] / sums["images"]),
            "images_above": float(sums["above"] / sums["images"]),
        }
    else:
        told = {"coverage": float(sums["covered"] / sums["rows"])}
    if "weight" in sums:
        told["coverage_in_production"] = float(sums["weighed"] / sums["weight"])
    if "cell_rows" in sums:
        enough = sums["cell_rows"] >= FEWEST
        if enough.any():
            shares = sums["cell_covered"][enough] / sums["cell_rows"][enough]
            told["least_covered"] = float(shares.min())
    if "set_size" in sums:
        told["mean_set_size"] = float(sums["set_size"] / sums["rows"])
        told["empty"] = float(sums["empty"] / sums["rows"])
    elif math.isfinite(sums["width"]):
        told["mean_width"] = float(sums["width"] / sums["widths"])
    return told


def _merged(a: _Measured, b: _Measured) -> _Measured:
    return _Measured(
        _sum(a.frozen, b.frozen),
        _sum(a.hedged, b.hedged),
        {name: _added(sums, b.levels[name]) for name, sums in a.levels.items()},
        _added(a.rest, b.rest),
    )


def _sum(a: Totals, b: Totals) -> Totals:
    if isinstance(a, RegressionTotals):
        assert isinstance(b, RegressionTotals)
        return merge(a, b)
    assert isinstance(b, ClassificationTotals)
    return merge(a, b)


def _added(a: Sums, b: Sums) -> Sums:
    return {name: value + b[name] for name, value in a.items()}


def _measure(fitted: Fitted, tested: Piece) -> _Measured | None:
    """The sums of some test rows; None for no rows."""
    blocks = list(tested.rows())
    if not sum(map(len, blocks)):
        return None
    test = join(blocks)
    group = None if tested.groups is None else codes_of(fitted, tested.groups)
    out = run_head(fitted.head, test, group=group, u=tested.u)
    if fitted.head.task == "classification":
        return _measure_classes(fitted, test, group, out)
    return _measure_values(fitted, test, group, out)


def _measure_classes(
    fitted: Fitted, test: Features, group: Array | None, out: Mapping[str, Array]
) -> _Measured:
    y, per = np.asarray(test.y, np.int64), _pixels(fitted)
    rows = np.arange(len(y))
    levels: dict[str, Sums] = {}
    for g in fitted.conformal.guarantees:
        q = _thresholds(fitted, g, group, test)
        if g.kind == "missed":
            c = int(fitted.conformal.settings["mask"])
            mask = out["set_scores"][:, c] <= q[:, 0]
            levels[level_name(g.alpha)] = _missed(mask, y == c, per or 1)
            continue
        sets = out["set_scores"] <= q
        inside = sets[rows, y]
        levels[level_name(g.alpha)] = {
            **_covered(inside, g.alpha, per),
            **_weighed(inside, _weights(fitted, test, y)),
            **_by_cell(inside, y, group, fitted),
            "set_size": np.asarray(sets.sum()),
            "empty": np.asarray((sets.sum(1) == 0).sum()),
        }
    return _Measured(
        classification_totals(softmax(test.z), test.z.argmax(1), y),
        classification_totals(out["probs"], out["label"], y),
        levels,
        {"rows": np.asarray(len(y))},
    )


def _measure_values(
    fitted: Fitted, test: Features, group: Array | None, out: Mapping[str, Array]
) -> _Measured:
    y, per, interval = np.asarray(test.y, np.float64), _pixels(fitted), fitted.head.interval
    score = interval_scores(interval, y, out["mean"], out["std"])
    levels: dict[str, Sums] = {}
    for g in fitted.conformal.guarantees:
        q = _thresholds(fitted, g, group, test)
        inside = score <= np.broadcast_to(q, (len(y), 1))[:, 0]
        lower, upper = bounds(interval, q, out["mean"], out["std"])
        levels[level_name(g.alpha)] = {
            **_covered(inside, g.alpha, per),
            **_weighed(inside, _weights(fitted, test, y[:, 0])),
            **_by_cell(inside, None, group, fitted),
            "width": np.asarray((upper - lower).sum(dtype=np.float64)),
            "widths": np.asarray((upper - lower).size),
        }
    rest: Sums = {"rows": np.asarray(len(y))}
    if TRANSFORMS in fitted.scores:
        signed, base = signed_residuals(y, out["mean"], out["std"]), base_of(fitted.head)
        found = log_density(base, fitted.scores[TRANSFORMS], signed, out["std"])
        rest |= {"log_density": np.asarray(found.sum()), "densities": np.asarray(found.size)}
    hedged = update_regression(RegressionTotals(), mean=out["mean"], std=out["std"], y=y)
    squared = float(((y - test.z) ** 2).mean(axis=1).sum())
    frozen = RegressionTotals(n=len(y), squared_error_sum=squared)
    return _Measured(frozen, hedged, levels, rest)


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


def _weighed(inside: Array, weights: Array | None) -> Sums:
    """Of the coverage of production rows as the weights have it."""
    if weights is None:
        return {}
    return {"weighed": np.asarray(weights @ inside), "weight": np.asarray(weights.sum())}


def _by_cell(inside: Array, y: Array | None, group: Array | None, fitted: Fitted) -> Sums:
    """Of the coverage of each class or known group, where they have thresholds of their own."""
    cells = fitted.head.cells
    if not isinstance(cells, Cells):
        return {}
    if cells.by == "group":
        assert group is not None
        cell, n = group_index(cells.of, group), len(cells.of)
    else:
        assert y is not None
        cell, n = y, fitted.head.width
    known = cell < n
    return {
        "cell_rows": np.bincount(cell[known], minlength=n),
        "cell_covered": np.bincount(cell[known], inside[known], minlength=n),
    }


def _pixels(fitted: Fitted) -> int | None:
    """Pixels drawn from an image; None where rows are no pixels."""
    if all(g.kind == "coverage" for g in fitted.conformal.guarantees):
        return None
    key = "set" if fitted.head.task == "classification" else "interval"
    return int(fitted.scores[key].shape[1])


def _covered(inside: Array, alpha: float, per: int | None) -> Sums:
    """Of the coverage of rows; of images the share of uncovered pixels, and how many have over
    alpha."""
    rows = {"rows": np.asarray(len(inside))}
    if per is None:
        return {**rows, "covered": np.asarray(inside.sum())}
    shares = 1 - inside.reshape(-1, per).mean(axis=1)
    return {
        **rows,
        "images": np.asarray(len(shares)),
        "uncovered": np.asarray(shares.sum()),
        "above": np.asarray((shares > alpha).sum()),
    }


def _missed(mask: Array, shown: Array, per: int) -> Sums:
    """Of the mean over images of the share of a class's drawn pixels outside its mask, where any
    were."""
    count = shown.reshape(-1, per).sum(axis=1)
    outside = (shown & ~mask).reshape(-1, per).sum(axis=1)
    some = count > 0
    return {
        "shown": np.asarray(some.sum()),
        "missed": np.asarray((outside[some] / count[some]).sum()),
        "mask": np.asarray(mask.sum()),
        "pixels": np.asarray(len(mask)),
    }


def _classification(totals: Totals) -> dict[str, float]:
    assert isinstance(totals, ClassificationTotals)
    return {
        "accuracy": totals.accuracy,
        "nll": totals.log_loss,
        "ece": totals.ece,
        "brier": totals.brier,
    }
