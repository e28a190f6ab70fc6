"""Risk control from a table of losses: n exchangeable items at L settings, losses in [0, bound].

Two promises about settings that were fixed without these items; the mean over items is the risk.

`conformal_risk_control`, for losses that never rise from one setting to the next: the first setting
with ``n/(n+1) R + bound/(n+1) <= level`` has an expected loss of at most ``level`` (Angelopoulos,
Bates, Fisch, Lei & Schuster 2022, arXiv:2208.02814, Theorem 1). `learn_then_test`, for any losses:
with probability 1-delta over the items, every admissible setting has a risk of at most ``level``
(Angelopoulos, Bates, Candès, Jordan & Lei 2021, arXiv:2110.01052, Theorem 1), by p-values of "the
risk is above the level" and control of the family-wise error. A ratio of two losses, such as the
error among answered rows, is neither: see `calibration.threshold.fit_abstention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import binom

from calibration.conformal.risk import hoeffding_bentkus, loss_budget, needed
from calibration.conformal.risk_control import RiskControl
from posthoc.contract import F64, Array, DataError

Order = Sequence[int] | Array | Literal["auto", "falling"]
SET_ASIDE = 0.25  # of the items, for the order "auto"
_ROUNDING = 1e-9  # of losses, in bounds


def conformal_risk_control(
    losses: Array,
    level: float,
    *,
    bound: float = 1.0,
    settings: Sequence[str] | None = None,
    cost: Sequence[float] | None = None,
    monotonise: bool = False,
) -> RiskControl:
    """The settings whose expected loss is at most ``level``, from losses n×L that never rise.

    They are the first with ``(n R + bound)/(n+1) <= level`` and all after it; ``cost`` (L numbers)
    chooses among them, else the first. With ``monotonise`` an item's loss counts as its largest
    from there on, which is no less and never rises: the promise then holds for losses as given.

    Raises DataError for losses that are no n×L numbers in [0, bound], that rise (naming the item),
    or a level outside (0, bound).
    """
    x, names = _checked(losses, level, bound, settings)
    ceiling = np.maximum.accumulate(x[:, ::-1], axis=1)[:, ::-1]
    if not monotonise:
        _refuse_rises(x, bound, names)
    n, alpha = len(x), level / bound
    sums = ceiling.sum(axis=0) / bound
    first = int(np.count_nonzero(sums > loss_budget(n, alpha) + _ROUNDING))
    admissible, risks = tuple(range(first, len(names))), x.mean(axis=0)
    return RiskControl(
        method="conformal risk control",
        level=level,
        delta=None,
        bound=bound,
        n=n,
        n_needed=needed(alpha),
        settings=names,
        risks=tuple(risks.tolist()),
        admissible=admissible,
        chosen=_cheapest(admissible, cost, risks),
        monotonised=monotonise,
    )


def learn_then_test(
    losses: Array,
    level: float,
    delta: float,
    *,
    bound: float = 1.0,
    settings: Sequence[str] | None = None,
    cost: Sequence[float] | None = None,
    order: Order | None = None,
    binary: bool | None = None,
    seed: int = 0,
) -> RiskControl:
    """The settings that have, all at once and with probability 1-delta, a risk of at most
    ``level``, from any losses n×L.

    Without ``order`` every setting is tested, by Holm's form of Bonferroni's correction. An order
    tests one setting after the other at the full delta until one fails; it must not come from
    these items: indices of settings, the losses m×L of other items (lowest mean first, of equals
    the last), "falling" (from the last setting to the first), or "auto", which sets a quarter of
    the items, drawn with ``seed``, aside for it. ``cost`` (L numbers, which may come from
    anywhere) chooses among the admissible, else the first of the table.

    p-values are Hoeffding-Bentkus (`hoeffding_bentkus`), or exact binomial tails where losses are
    0 or ``bound`` by nature: ``binary`` says so, by default for booleans, and for integers with a
    bound of 1. That these losses happen to be whole is not enough.

    Raises DataError for losses that are no n×L numbers in [0, bound], a level outside (0, bound),
    a delta outside (0, 1), an order that is none, or binary losses in between.
    """
    x, names = _checked(losses, level, bound, settings)
    kind = np.asarray(losses).dtype.kind
    if binary is None:
        binary = kind == "b" or (kind in "iu" and bound == 1)
    if binary:
        _refuse_between(x, bound, names)
    alpha, width = level / bound, len(names)
    n_needed = needed(alpha, delta)
    sequence = None
    if order is None:
        n_needed = needed(alpha, delta / width)
    else:
        x, sequence = _sequence(order, x, bound, names, seed)
    n = len(x)
    if binary:
        p = np.asarray(binom.cdf(np.rint(x.sum(axis=0) / bound), n, alpha))
    else:
        p = np.asarray([hoeffding_bentkus(r, n, alpha) for r in x.mean(axis=0) / bound])
    passed = _holm(p, delta) if sequence is None else _until_one_fails(p, delta, sequence)
    admissible, risks = tuple(sorted(passed)), x.mean(axis=0)
    return RiskControl(
        method="learn then test",
        level=level,
        delta=delta,
        bound=bound,
        n=n,
        n_needed=n_needed,
        settings=names,
        risks=tuple(risks.tolist()),
        admissible=admissible,
        chosen=_cheapest(admissible, cost, risks),
        pvalues=tuple(p.tolist()),
        test="exact binomial" if binary else "Hoeffding-Bentkus",
        correction="Bonferroni-Holm" if sequence is None else "fixed sequence",
        order=sequence,
    )


def _holm(p: F64, delta: float) -> list[int]:
    """Holm 1979: the j-th smallest of L passes at delta/(L-j+1), until one fails."""
    order = np.argsort(p, kind="stable")
    fails = p[order] > delta / np.arange(len(p), 0, -1)
    return [int(i) for i in order[: int(fails.argmax()) if fails.any() else len(p)]]


def _until_one_fails(p: F64, delta: float, sequence: Sequence[int]) -> list[int]:
    passed = []
    for i in sequence:
        if p[i] > delta:
            break
        passed.append(i)
    return passed


def _sequence(
    order: Order, x: F64, bound: float, names: tuple[str, ...], seed: int
) -> tuple[F64, tuple[int, ...]]:
    """The items that are tested, and the order of their settings."""
    n, width = x.shape
    if isinstance(order, str):
        if order == "falling":
            return x, tuple(range(width))[::-1]
        if order != "auto":
            raise DataError(f"order is 'auto', 'falling', indices or losses, not {order!r}")
        if n < 2:
            raise DataError("the order 'auto' sets items aside and needs at least two")
        aside = np.random.default_rng(seed).permutation(n) < max(1, math.floor(n * SET_ASIDE))
        return x[~aside], _surest_first(x[aside])
    given = np.asarray(order)
    if given.ndim == 2:
        if given.shape[1] != width:
            raise DataError(
                f"the losses of other items have {given.shape[1]} settings where there are {width}"
            )
        return x, _surest_first(_bounded(given, bound, names))
    whole = given.ndim == 1 and len(given) > 0 and given.dtype.kind in "iu"
    if not whole or len(set(given.tolist())) < len(given) or not set(given) <= set(range(width)):
        raise DataError(
            f"an order lists indices of settings, each once and in 0…{width - 1}, not {order!r}"
        )
    return x, tuple(given.tolist())


def _surest_first(losses: F64) -> tuple[int, ...]:
    """By mean loss; of equals the last first, which is the safest where losses fall."""
    last = losses.shape[1] - 1
    return tuple((last - np.argsort(losses.mean(axis=0)[::-1], kind="stable")).tolist())


def _cheapest(admissible: Sequence[int], cost: Sequence[float] | None, risks: F64) -> int | None:
    """The admissible setting of least cost (then risk), without costs the first."""
    if cost is None:
        return admissible[0] if admissible else None
    c = np.asarray(cost, np.float64)
    if c.shape != risks.shape or np.isnan(c).any():
        raise DataError(f"cost is a number for each of {len(risks)} settings, not {cost!r}")
    return min(admissible, key=lambda i: (c[i], risks[i], i), default=None)


def _checked(
    losses: Array, level: float, bound: float, settings: Sequence[str] | None
) -> tuple[F64, tuple[str, ...]]:
    """Losses as float64 n×L in [0, bound], and the names of the settings."""
    if not (bound > 0 and math.isfinite(bound)):
        raise DataError(f"bound, the largest possible loss, must be above 0, not {bound}")
    if not 0 < level < bound:
        raise DataError(f"level must lie strictly between 0 and the bound {bound:g}, not {level}")
    x = np.asarray(losses)
    if x.ndim != 2 or x.dtype.kind not in "fiub":
        raise DataError(f"losses are numbers, items × settings, not {x.dtype} of shape {x.shape}")
    if 0 in x.shape:
        raise DataError(f"there are {x.shape[0]} items and {x.shape[1]} settings: no losses")
    names = tuple(map(str, range(x.shape[1]) if settings is None else settings))
    if len(names) != x.shape[1]:
        raise DataError(f"{len(names)} names for {x.shape[1]} settings")
    return _bounded(x, bound, names), names


def _bounded(losses: Array, bound: float, names: Sequence[str]) -> F64:
    x = np.asarray(losses, np.float64)
    slack = _ROUNDING * bound
    outside = ~((x >= -slack) & (x <= bound + slack))
    if outside.any():
        i, j = np.argwhere(outside)[0]
        raise DataError(
            f"item {i}: its loss {x[i, j]:g} at setting {names[j]} is not in [0, {bound:g}]; "
            "give the largest possible loss as the bound"
        )
    return np.clip(x, 0.0, bound)


def _refuse_rises(x: F64, bound: float, names: Sequence[str]) -> None:
    rises = np.diff(x, axis=1) > _ROUNDING * bound
    if rises.any():
        i, j = np.argwhere(rises)[0]
        raise DataError(
            f"item {i}: its loss rises from {x[i, j]:g} at setting {names[j]} to {x[i, j + 1]:g} "
            f"at {names[j + 1]} ({int(rises.any(axis=1).sum())} of {len(x)} items rise), and "
            "conformal risk control is for losses that never do: give delta for learn-then-test, "
            "or monotonise to count an item's largest loss from a setting on"
        )


def _refuse_between(x: F64, bound: float, names: Sequence[str]) -> None:
    between = (x != 0) & (x != bound)
    if between.any():
        i, j = np.argwhere(between)[0]
        raise DataError(
            f"item {i}: its loss {x[i, j]:g} at setting {names[j]} is neither 0 nor {bound:g}, "
            "so losses are not binary"
        )
