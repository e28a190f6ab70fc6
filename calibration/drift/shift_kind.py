"""Which kind of shift: other shares of the same classes, some strange rows, or all rows moved.

A statement about a window of served rows beside a reference of them, no alarm: it may be wrong in
about three of a hundred looks at a healthy stream, so it is read when something else has alarmed.
In order:

**Nothing.** p-values and confidence stay within the floors of their KS distances, and predicted
classes within chance (Pearson's chi-squared of two samples, rare ones together), each at `LEVEL`.

**Class mix.** Where p(x|y) stays and p(y) changes, a row of the reference counts
``sum_y w(y) p(y|x)`` times, w the ratios of class shares (Saerens, Latinne & Decaestecker 2002,
Neural Computation 14). w is found from predicted classes alone; if the reference weighed with it
has the window's p-values and confidence, other shares explain everything.

**Some rows or all.** New classes come as a share of strange rows, beside which the others are as
they were: above a p-value of `BULK` there are fewer, in the same shape (Storey 2002, "A direct
approach to false discovery rates", JRSS B 64, whose estimate of that share this is). A disturbance
of every row thins the rows above `MIDDLE` more than those between. How much more, if all scores
moved by the same step of a normal distribution, follows from the share that left the bulk.

What cannot be told is said to be so. New classes and a disturbance that leaves some rows alone look
alike in these numbers; how far the strange rows crowd into few predicted classes, which new classes
tend to do, is given as a figure.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np

from calibration.drift.distance import distance
from calibration.drift.saved import Saved, read, text_of
from posthoc.contract import F64, I64, Array, DataError

NAME = "shift_kind"
Kind = Literal["none", "class_mix", "some_rows", "all_rows", "cannot_tell"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ASSUMES = (
    "Rows count as independent, and those of the reference as healthy. 'none' is no proof. "
    "'class_mix' trusts the probabilities of the reference to be calibrated. 'some_rows' are new "
    "classes, or known ones that something disturbs in some rows and not in others: these look "
    "alike. 'all_rows' is not new classes alone, unless they are most of the rows. Two kinds at "
    "once are told as one. Nothing here sees a truth that changed while the inputs did not."
)
MOST_CLASSES = 256  # the reference holds a number for each pair of them
LEVEL = 0.01  # of each of three tests: the floors of `distance`
BULK, MIDDLE, STRANGE = 0.3, 0.65, 0.1  # p-values
MOVED, SAME = 3.0, 1.64  # standard deviations of the lean that decide
LEFT = 0.1  # of the bulk: where less is left, all rows moved

_PVALUES = np.arange(1, 20) / 20
_CONFIDENCES = np.array(
    [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999]
)
_P, _C = len(_PVALUES) + 1, len(_CONFIDENCES) + 1
_BULK, _MIDDLE, _STRANGE = (round(p * _P) for p in (BULK, MIDDLE, STRANGE))  # first bins above
_FEW = 5  # expected rows of a class that is tested by itself
_ROUNDS, _CLOSE = 500, 1e-6
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Reference:
    """Totals of ``n`` rows of C classes. ``labels`` C·C, ``pvalues`` 20·C and ``confidences`` 15·C,
    in row-major order, sum probabilities by predicted class and by bin; ``strange`` C counts rows
    with p-values up to STRANGE by predicted class."""

    classes: int
    labels: tuple[float, ...]
    pvalues: tuple[float, ...]
    confidences: tuple[float, ...]
    strange: tuple[int, ...]
    n: int = 0


@dataclass(frozen=True, slots=True)
class Shift:
    """The ``kind`` of ``rows`` recent rows, and what it rests on.

    ``ks_pvalue`` and ``ks_confidence`` are distances, ``ks_floor`` what they stay below by chance;
    ``classes`` is the p-value of the predicted classes. ``strange`` is the share of rows that the
    reference does not explain (0 where it explains more), from ``low`` to ``high`` at 95 %.
    It counts strange rows whose p-value is above BULK as usual ones, and so tends to be too low.
    ``lean`` is the logarithm of how much more the bulk thinned above MIDDLE than below, with
    standard deviation ``lean_sd``; ``lean_if_all`` is that of an even move of all rows, nan where
    the bulk did not thin. ``crowding``: distance in total variation of the classes predicted of the
    rows that are strange beyond the reference's share from those of the reference, less what chance
    shows, nan for fewer than 30 of them.
    """

    kind: Kind
    rows: int
    ks_pvalue: float
    ks_confidence: float
    ks_floor: float
    classes: float
    strange: float
    low: float
    high: float
    lean: float
    lean_sd: float
    lean_if_all: float
    crowding: float


class _Saved(Saved):
    classes: int
    labels: tuple[float, ...]
    pvalues: tuple[float, ...]
    confidences: tuple[float, ...]
    strange: tuple[int, ...]
    n: int


def to_json(reference: Reference) -> str:
    """One line of JSON, from which ``from_json`` makes an equal reference, to the last bit."""
    return text_of(_Saved(detector=NAME, **asdict(reference)))


def from_json(text: str) -> Reference:
    """The inverse of ``to_json``. Raises DataError for anything else."""
    found = Reference(**read(_Saved, NAME, text).model_dump(exclude={"detector", "version"}))
    c = found.classes
    sizes = [len(v) for v in (found.labels, found.pvalues, found.confidences, found.strange)]
    if sizes != [c * c, _P * c, _C * c, c]:
        raise DataError("the parts of a saved reference of shift_kind do not match: start anew")
    return found


def start(classes: int) -> Reference:
    """No rows, of 2 to MOST_CLASSES classes; DataError for others."""
    if not 2 <= classes <= MOST_CLASSES:
        raise DataError(f"kinds of shift are told for 2 to {MOST_CLASSES} classes, not {classes}")
    none = [(0.0,) * (k * classes) for k in (classes, _P, _C)]
    return Reference(classes, none[0], none[1], none[2], (0,) * classes)


def cells(label: Array, confidence: Array, pvalue: Array | None) -> I64:
    """N numbers that hold all that is kept of N rows: predicted class, bins of confidence and
    p-value (None: there are none, and only a class mix can be told). Raises DataError for a label
    below 0 and for numbers that are not finite."""
    y = np.asarray(label, np.int64)
    c = np.asarray(confidence, np.float64)
    p = np.zeros(len(y)) if pvalue is None else np.asarray(pvalue, np.float64)
    if not len(y) == len(c) == len(p):
        raise DataError(f"{len(y)} labels have {len(c)} confidences and {len(p)} p-values")
    if not (np.isfinite(c).all() and np.isfinite(p).all() and (y >= 0).all()):
        raise DataError("a label, confidence or p-value is negative or no number")
    return (y * _P + np.searchsorted(_PVALUES, p)) * _C + np.searchsorted(_CONFIDENCES, c)


def update(reference: Reference, rows: I64, probs: Array) -> Reference:
    """The reference with N more rows: their `cells` and probabilities, N×C. Sums are the same,
    within rounding, however rows are cut. Raises DataError for other classes."""
    p = np.asarray(probs, np.float64)
    c = reference.classes
    label, strange, confidence = _apart(rows, c)
    if p.shape != (len(rows), c) or not np.isfinite(p).all():
        raise DataError(f"{len(rows)} rows of {c} classes have probabilities of shape {p.shape}")
    p = p / p.sum(axis=1, keepdims=True)
    few = np.bincount(label[strange < _STRANGE], minlength=c)
    return merge(
        reference,
        Reference(
            c,
            _sums(label, p, c),
            _sums(strange, p, _P),
            _sums(confidence, p, _C),
            tuple(few.tolist()),
            len(rows),
        ),
    )


def merge(a: Reference, b: Reference) -> Reference:
    """The reference of the rows of both. Raises DataError for other classes."""
    if a.classes != b.classes:
        raise DataError(f"references of {a.classes} and {b.classes} classes cannot be merged")
    return Reference(
        a.classes,
        _added(a.labels, b.labels),
        _added(a.pvalues, b.pvalues),
        _added(a.confidences, b.confidences),
        tuple(x + y for x, y in zip(a.strange, b.strange, strict=True)),
        a.n + b.n,
    )


def compare(reference: Reference, recent: I64) -> Shift:
    """What the `cells` of M recent rows say beside the reference. Raises DataError where either
    has no rows, or a class is none of the reference's."""
    c, m = reference.classes, len(recent)
    if not reference.n or not m:
        raise DataError("a kind of shift needs rows of a reference and recent ones; one has none")
    label, p, confidence = _apart(recent, c)
    joint, of_p, of_c = (
        np.asarray(v).reshape(-1, c)
        for v in (reference.labels, reference.pvalues, reference.confidences)
    )
    now = [np.bincount(v, minlength=k) for v, k in ((p, _P), (confidence, _C))]
    before = [v.sum(axis=1) for v in (of_p, of_c)]
    by_p, by_c = (distance(a, b) for a, b in zip(before, now, strict=True))
    classes = _same_classes(joint.sum(axis=1), np.bincount(label, minlength=c))
    strange, low, high = _beyond(before[0], now[0])
    lean, sd, if_all = _lean(before[0], now[0])
    far_p = by_p.ks > by_p.ks_floor
    kind: Kind
    if not (far_p or by_c.ks > by_c.ks_floor or classes < LEVEL):
        kind = "none"
    elif classes < LEVEL and _explained(joint, label, (of_p, of_c), now):
        kind = "class_mix"
    elif not far_p or math.isnan(if_all):
        kind = "cannot_tell"
    elif strange > 1 - LEFT or lean > MOVED * sd:
        kind = "all_rows"
    else:
        # Neither leaning, nor so little sure of it that all rows may have moved.
        apart = lean < SAME * sd and lean + SAME * sd < if_all
        kind = "some_rows" if apart else "cannot_tell"
    crowding = _crowding(reference, joint.sum(axis=1), label, p < _STRANGE, 1 - strange)
    return Shift(
        kind,
        m,
        *(by_p.ks, by_c.ks, by_p.ks_floor, classes),
        *(strange, low, high, lean, sd, if_all, crowding),
    )


def _apart(rows: I64, classes: int) -> tuple[I64, I64, I64]:
    """(predicted class, bin of the p-value, bin of confidence) of cells."""
    label, rest = np.divmod(np.asarray(rows, np.int64), _P * _C)
    if len(label) and not 0 <= label.min() <= label.max() < classes:
        raise DataError(f"rows of class {label.max()} are none of {classes} classes")
    return label, rest // _C, rest % _C


def _sums(at: I64, p: F64, k: int) -> tuple[float, ...]:
    total = np.zeros((k, p.shape[1]))
    np.add.at(total, at, p)
    return tuple(total.ravel().tolist())


def _added(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    return tuple((np.asarray(a) + np.asarray(b)).tolist())


def _same_classes(a: F64, b: I64) -> float:
    """The p-value of two samples, by counts of C classes, having the same shares."""
    from scipy.special import chdtrc  # here: a server needs no scipy

    n, m = a.sum(), b.sum()
    few = (a + b) * min(n, m) / (n + m) < _FEW
    x, y = (np.append(v[~few], v[few].sum()) for v in (a, b))
    x, y = x[(there := x + y > 0)], y[there]
    if len(x) < 2:
        return 1.0
    gaps = math.sqrt(m / n) * x - math.sqrt(n / m) * y
    return float(chdtrc(len(x) - 1, (gaps**2 / (x + y)).sum()))


def _explained(joint: F64, label: I64, soft: tuple[F64, F64], now: list[I64]) -> bool:
    """Whether other shares of the classes explain the window's p-values and confidence."""
    n, share = float(joint.sum()), joint.sum(axis=0) / joint.sum()
    w = _class_weights(joint / n, share, np.bincount(label, minlength=len(joint)))
    if w is None:
        return False
    effective = n / max(1.0, float(share @ w**2))  # Jensen: a row's weight is a mean of w
    for matrix, counts in zip(soft, now, strict=True):
        found = distance(matrix @ w * effective / n, counts)
        if found.ks > found.ks_floor:
            return False
    return True


def _class_weights(joint: F64, share: F64, counts: I64) -> F64 | None:
    """Ratios of class shares by expectation and maximisation, as `calibration.shift.class_shift.em`
    has them of single rows: here rows are equal that have one predicted class, and are counted.
    None where no row's class was ever predicted."""
    said = (counts > 0) & (joint.sum(axis=1) > 0)
    if not said.any():
        return None
    given, q, seen = joint[said], counts[said] / counts[said].sum(), share > 0
    w = seen.astype(np.float64)
    for _ in range(_ROUNDS):
        total = given @ w
        new = w * (given.T @ (q / np.where(total > 0, total, 1.0)))
        new = np.where(seen, new / np.where(seen, share, 1.0), 0.0)
        done = np.abs(new - w).max() < _CLOSE
        w = new
        if done:
            break
    return w / float(share @ w)


def _beyond(before: F64, now: I64) -> tuple[float, float, float]:
    """(share of rows that the reference does not explain, low, high)."""
    a, b = before[_BULK:].sum() + 0.5, now[_BULK:].sum() + 0.5
    n, m = before.sum() + 0.5, now.sum() + 0.5
    left = (b / m) / (a / n)
    off = math.exp(1.96 * math.sqrt(max(0.0, 1 / a - 1 / n) + max(0.0, 1 / b - 1 / m)))
    strange, low, high = (min(1.0, max(0.0, 1 - x)) for x in (left, left * off, left / off))
    return strange, low, high


def _lean(before: F64, now: I64) -> tuple[float, float, float]:
    """(lean, its standard deviation, the lean of an even move of all rows)."""
    (a, b), (c, d) = (
        (h[_BULK:_MIDDLE].sum() + 0.5, h[_MIDDLE:].sum() + 0.5) for h in (before, now)
    )
    lean = math.log(c / d) - math.log(a / b)
    sd = math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    n, m = before.sum() + 1, now.sum() + 1
    bulk, left, top = (a + b) / n, (c + d) / m, b / n
    if not left < bulk < 1:
        return lean, sd, math.nan
    step = _NORMAL.inv_cdf(bulk) - _NORMAL.inv_cdf(left)
    above = _NORMAL.cdf(_NORMAL.inv_cdf(top) - step)
    return lean, sd, math.log((left - above) / above) - math.log(a / b)


def _crowding(reference: Reference, before: F64, label: I64, strange: Array, left: float) -> float:
    """See `Shift`. Chance: the mean of |normal| of each class's standard deviation, halved."""
    c, n, m = reference.classes, reference.n, len(label)
    here = np.bincount(label[np.asarray(strange)], minlength=c) / m
    usual = left * np.asarray(reference.strange) / n
    more = np.maximum(here - usual, 0.0)
    total = float(more.sum())
    if total * m < 30:
        return math.nan
    share = before / before.sum()
    sd = np.sqrt((here / m + left * usual / n) / total**2 + share * (1 - share) / n)
    distance_of = 0.5 * float(np.abs(more / total - share).sum())
    return distance_of - 0.5 * math.sqrt(2 / math.pi) * float(sd.sum())
