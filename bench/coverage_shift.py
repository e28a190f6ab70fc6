"""Weighted conformal thresholds under a shift that is made, and so known.

Production and test rows are thinned: a row stays with a probability in proportion to w. Rows one
standard deviation along a direction are twice as likely, those one against it half as likely, up to
two: w = 2^t, t in [-2, 2]. The directions:

- ``feature``: the first principal component of the features;
- ``doubt``: entropy, or the logarithm of the standard deviation: production is harder;
- ``target``: classes by their share, the rarest twice as likely, the most common half; or the
  target of a regression.

Thresholds are those without weights, with the true w (``oracle``), and with w as the library
estimates it from unlabelled production rows, which are thinned module rows (``estimated``; of
classes also by the confusion matrix, ``bbse``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bench.coverage_cells import ALPHAS
from bench.coverage_rows import Rows, Split
from calibration.bundle import threshold_at
from calibration.conformal.intervals import interval_scores, make
from calibration.conformal.scores import class_scores
from calibration.shift.class_shift import bbse, class_weights
from calibration.shift.density_ratio import check_overlap, fit_density_ratio
from calibration.shift.retasa import retasa
from calibration.shift.weighted import effective_rows, threshold, weighted
from posthoc.contract import F64, Array, FitError

SHIFTS = ("feature", "doubt", "target")
REACH = 2.0
Thresholds = Callable[[float], Array]  # alpha -> thresholds of the test rows at their truths


@dataclass(frozen=True, slots=True)
class Shifted:
    """Coverage of ``m`` thinned test rows by one form of thresholds; None where it was refused,
    with why. ``effective`` rows of ``n`` conformal ones."""

    shift: str
    form: str
    alpha: float
    n: int
    m: int
    coverage: float | None
    effective: float
    refused: str = ""


def shifted(split: Split, seed: int) -> Iterator[Shifted]:
    """Every shift, form and level of a split."""
    for i, shift in enumerate(SHIFTS):
        w = _tilt(split, shift)
        rng = np.random.default_rng((seed, i))
        module, known = split.module, split.conformal
        coming = module.take(_thinned(w(module), rng))
        new = split.test.take(_thinned(w(split.test), rng))
        own, true = _scores(split, known), _scores(split, new)
        for form, make_form in _forms(split, shift, w, own, coming, new, seed):
            limits: Thresholds | None = None
            effective, why = float(len(own)), ""
            try:
                limits, effective = make_form()
            except FitError as e:
                why = str(e)
            for alpha in ALPHAS:
                held = None if limits is None else float((true <= limits(alpha)).mean())
                yield Shifted(shift, form, alpha, len(own), len(new), held, effective, why)


Made = tuple[Thresholds, float]


def _forms(
    split: Split,
    shift: str,
    w: Callable[[Rows], F64],
    own: F64,
    coming: Rows,
    new: Rows,
    seed: int,
) -> Iterator[tuple[str, Callable[[], Made]]]:
    known, seen, classes = split.conformal, split.calibration, split.task == "classification"
    ordered = np.sort(own)

    def unweighted() -> Made:
        return lambda alpha: np.full(len(new), threshold_at(ordered, alpha)), float(len(own))

    def oracle() -> Made:
        mine = w(known)
        made = weighted("covariate", own, mine, np.zeros(0))
        theirs = w(new)

        def limits(alpha: float) -> Array:
            # A row's threshold by its own weight, which of few there are.
            values, place = np.unique(theirs, return_inverse=True)
            found = [threshold(made.scores, made.weights, alpha, float(v)) for v in values]
            return np.asarray(found)[place]

        return limits, effective_rows(mine)

    def covariates() -> Made:
        ratio = fit_density_ratio(
            seen.z,
            coming.z,
            seed,
            temperature=split.temperature if classes else None,
            features=(seen.phi, coming.phi),
        )
        mine = ratio.weights(known.z, known.phi)
        check_overlap(float(mine.mean()))
        made = weighted("covariate", own, mine, np.zeros(0), ratio)
        return lambda alpha: made.of_rows(1 - alpha, new.z, new.phi), made.effective

    def of_classes(mine: F64) -> Made:
        made = weighted("target", own, mine[known.y], mine)
        return lambda alpha: made.thresholds(alpha)[new.y], made.effective

    def by_likelihood() -> Made:
        return of_classes(class_weights(seen.p, seen.y, coming.p))

    def by_confusion() -> Made:
        said = seen.p.argmax(1), coming.p.argmax(1)
        return of_classes(bbse(said[0], seen.y, said[1], seen.p.shape[1]))

    def of_values() -> Made:
        found = retasa(seen.z[:, 0], seen.y[:, 0], coming.z[:, 0], seed)
        order = np.argsort(seen.y[:, 0], kind="stable")
        mine = np.interp(known.y[:, 0], seen.y[order, 0], found[order])
        made = weighted("target", own, mine, np.asarray([mine.max()]))
        return lambda alpha: np.full(len(new), made.thresholds(alpha)[0]), made.effective

    yield "unweighted", unweighted
    yield "oracle", oracle
    if shift != "target":
        yield "estimated", covariates
    elif classes:
        yield "estimated", by_likelihood
        yield "bbse", by_confusion
    else:
        yield "estimated", of_values


def _tilt(split: Split, shift: str) -> Callable[[Rows], F64]:
    """w of rows, 2 to the power of at most REACH."""
    seen = split.calibration
    if shift == "target" and split.task == "classification":
        share = np.bincount(seen.y, minlength=seen.p.shape[1])
        rank = np.empty(len(share))
        rank[np.argsort(share, kind="stable")] = np.arange(len(share))
        powers = 1 - 2 * rank / (len(share) - 1)
        return lambda rows: np.asarray(2.0 ** powers[rows.y])
    value = _direction(split, shift)
    mean, deviation = value(seen).mean(), value(seen).std()

    def w(rows: Rows) -> F64:
        t = (value(rows) - mean) / max(deviation, 1e-12)
        return np.asarray(2.0 ** np.clip(t, -REACH, REACH))

    return w


def _direction(split: Split, shift: str) -> Callable[[Rows], F64]:
    """A number of each row, by calibration rows alone."""
    seen = split.calibration
    if shift == "feature":
        return _component(np.asarray(seen.phi, np.float64), lambda rows: rows.phi)
    if split.task == "classification":
        return lambda rows: -(rows.p * np.log(np.maximum(rows.p, 1e-300))).sum(1)
    if shift == "doubt":
        return lambda rows: np.log(np.asarray(rows.std[:, 0], np.float64))
    return lambda rows: np.asarray(rows.y[:, 0], np.float64)


def _component(x: F64, of: Callable[[Rows], Array]) -> Callable[[Rows], F64]:
    """The first principal component, its largest loading positive."""
    mean = x.mean(0)
    _, vectors = np.linalg.eigh(np.cov(x - mean, rowvar=False))
    axis = vectors[:, -1] * np.sign(vectors[np.abs(vectors[:, -1]).argmax(), -1])
    return lambda rows: np.asarray((of(rows) - mean) @ axis)


def _thinned(w: F64, rng: np.random.Generator) -> Array:
    return np.flatnonzero(rng.uniform(size=len(w)) < w / 2.0**REACH)


def _scores(split: Split, rows: Rows) -> F64:
    """Of the truth: LAC, or the normalised residual."""
    if split.task == "classification":
        s = class_scores("lac", {}, rows.p)
        return np.asarray(s[np.arange(len(rows)), rows.y])
    return interval_scores(make("residual", "two", split.noise, 0.0), rows.y, rows.mean, rows.std)
