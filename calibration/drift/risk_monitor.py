"""Is coverage, or accuracy, still as good as the bundle promised? Anytime-valid, from labels.

Podkopaev & Ramdas 2022, "Tracking the risk of a deployed model and detecting harmful distribution
shifts", ICLR: what the reference shows at least, less a tolerance, is tested against a stream that
may be looked at after every label. The null is that the running mean of the coverage (given the
past, so it may wander) is never below ``floor``. One share of the error is spent on the reference,
the other on the stream; a healthy bundle alarms, ever, with probability at most their sum.

**Stream.** With s of n rows covered and a shift t > 0 of the log-odds, the likelihood ratio
Q(t; m) = exp(-t s) / (1 - m + m exp(-t))^n tests the mean m. If the running mean is m or more, it
is at most a martingale that starts at 1, since the log of a linear function is concave; and so is
the mean over a fixed grid of shifts. That is the method of mixtures (Robbins 1970), in the
sub-Bernoulli case of Howard, Ramdas, McAuliffe & Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", Ann. Statist. 49; bets of Waudby-Smith & Ramdas 2024,
"Estimating means of bounded random variables by betting", JRSS B 86, that were fixed beforehand.
All m for which it stays below 1/error are a confidence sequence of the running mean; at ``floor``
it is the evidence against the null.

It depends on n and s alone. So counts may come grouped: the order within a group is lost, and with
it only an alarm that would have come and gone inside; what is read at the end of a group is exact.
It speaks of rows that got a label, which are rarely chosen at random.

**Several.** The error is each monitor's own. Of m monitors, of levels or of coverage and accuracy,
any ever alarms falsely with probability at most the sum of their errors, however much they share:
give each error / m where the sum is to be error.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from calibration.bundle import conformal_rank
from calibration.drift.saved import Saved, read, text_of
from posthoc.contract import F64, Array, DataError

NAME = "risk monitor"
TOLERANCE = 0.02
REFERENCE_SHARE = 0.5  # of the error; the rest is the stream's
# Of the log-odds, each twice the one before: the nearest grows at 8/9 of the best rate or faster.
SHIFTS: F64 = np.asarray(2.0 ** np.arange(-9, 3), np.float64)

_BLOCK = 1 << 16  # rows worked on at a time
_LN10 = math.log(10)


@dataclass(frozen=True, slots=True)
class RiskMonitor:
    """``floor``: the least mean that is no alarm; ``error``: the stream's share of the error.

    ``n`` labelled rows so far, of which ``covered`` were covered (or right). ``log10_evidence``
    against the null now, ``log10_peak`` its maximum, at least 0.
    """

    floor: float
    error: float
    n: int = 0
    covered: int = 0
    log10_evidence: float = 0.0
    log10_peak: float = 0.0

    @property
    def alarm(self) -> bool:
        """Whether the null was ever rejected."""
        return self.log10_peak >= -math.log10(self.error)

    def bounds(self, error: float = 0.05) -> tuple[float, float]:
        """Lower and upper bound on the mean of the conditional coverage of the n rows so far.

        All of them together, over all time, are right with probability at least 1 - ``error``;
        either by itself with 1 - error/2. (0, 1) for no rows.
        """
        _share(error)
        return (
            1 - _upper(self.n, self.n - self.covered, error / 2),
            _upper(self.n, self.covered, error / 2),
        )


class _Saved(Saved):
    floor: float
    error: float
    n: int
    covered: int
    log10_evidence: float
    log10_peak: float


def to_json(state: RiskMonitor) -> str:
    """One line of JSON, from which ``from_json`` makes an equal state, to the last bit."""
    return text_of(_Saved(detector=NAME, **asdict(state)))


def from_json(text: str) -> RiskMonitor:
    """The inverse of ``to_json``. Raises DataError for anything else."""
    return RiskMonitor(**read(_Saved, NAME, text).model_dump(exclude={"detector", "version"}))


def watch_level(
    alpha: float, n_conformal: int, *, tolerance: float = TOLERANCE, error: float = 0.05
) -> RiskMonitor:
    """For sets or intervals of level 1 - alpha by a threshold from ``n_conformal`` rows.

    Their coverage is Beta(k, n+1-k), k being the conformal rank (Vovk 2012, "Conditional validity
    of inductive conformal predictors"); with ties it is more.
    """
    k = conformal_rank(n_conformal, alpha)
    known = error * REFERENCE_SHARE
    bound = _beta_quantile(known, k, n_conformal + 1 - k)
    return start(bound - tolerance, error - known)


def watch_share(
    hits: int, n: int, *, tolerance: float = TOLERANCE, error: float = 0.05
) -> RiskMonitor:
    """For a share that held in ``hits`` of ``n`` independent reference rows: accuracy, or the
    coverage of test rows. The bound is that of Clopper & Pearson 1934."""
    if not 0 <= hits <= n or n < 1:
        raise DataError(f"{hits} of {n} reference rows are no share")
    known = error * REFERENCE_SHARE
    return start(_beta_quantile(known, hits, n + 1 - hits) - tolerance, error - known)


def start(floor: float, error: float) -> RiskMonitor:
    """A monitor of a mean that is to stay at ``floor`` or above; all of ``error`` is the stream's.

    Raises DataError for an error outside (0, 1).
    """
    _share(error)
    return RiskMonitor(min(1.0, max(0.0, float(floor))), float(error))


def update(state: RiskMonitor, n: int, covered: int) -> RiskMonitor:
    """The state after a group of ``n`` more rows, ``covered`` of them covered."""
    if not 0 <= covered <= n:
        raise DataError(f"{covered} covered of {n} labelled rows")
    n, covered = state.n + int(n), state.covered + int(covered)
    now = float(_log10_evidence(np.asarray([n]), np.asarray([covered]), state.floor)[0])
    return replace(
        state, n=n, covered=covered, log10_evidence=now, log10_peak=max(state.log10_peak, now)
    )


def run(state: RiskMonitor, covered: Array) -> tuple[RiskMonitor, F64]:
    """(the state after T more rows, log10 of the evidence after each), ``covered`` T bool or 0/1.

    As T calls of ``update`` with one row each. Raises DataError for another number, naming the row.
    """
    hit = np.asarray(covered)
    bad = np.flatnonzero((hit != 0) & (hit != 1))
    if len(bad):
        raise DataError(f"row {bad[0]}: covered is {hit[bad[0]]}, neither 0 nor 1")
    path = np.empty(len(hit))
    n, s, peak = state.n, state.covered, state.log10_peak
    for first in range(0, len(hit), _BLOCK):
        rows = slice(first, first + _BLOCK)
        upto = s + np.cumsum(hit[rows].astype(np.int64))
        count = n + np.arange(1, len(upto) + 1)
        path[rows] = _log10_evidence(count, upto, state.floor)
        n, s, peak = int(count[-1]), int(upto[-1]), max(peak, float(path[rows].max()))
    now = float(path[-1]) if len(path) else state.log10_evidence
    return replace(state, n=n, covered=s, log10_evidence=now, log10_peak=peak), path


def _log10_evidence(n: Array, covered: Array, mean: float) -> F64:
    """log10 of the mean over shifts of Q(shift; mean), for T counts."""
    each = -np.multiply.outer(covered, SHIFTS) - np.multiply.outer(
        n, np.log1p(mean * np.expm1(-SHIFTS))
    )
    most = each.max(axis=1)
    total = np.exp(each - most[:, None]).sum(axis=1) / len(SHIFTS)
    return np.asarray((most + np.log(total)) / _LN10)


def _upper(n: int, covered: int, error: float) -> float:
    """The largest mean that is not rejected: the evidence rises with it, up to 1/error there."""
    count, hits, limit = np.asarray([n]), np.asarray([covered]), -math.log10(error)
    low, high = covered / n if n else 0.0, 1.0
    if _log10_evidence(count, hits, high)[0] < limit:
        return 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if _log10_evidence(count, hits, middle)[0] < limit:
            low = middle
        else:
            high = middle
    return high


def _beta_quantile(level: float, a: int, b: int) -> float:
    """Of Beta(a, b); the ends where a or b is 0. Raises DataError for a level outside (0, 1)."""
    from scipy.special import betaincinv  # here: who only updates needs no scipy

    _share(level)
    if not a:
        return 0.0
    return float(betaincinv(a, b, level)) if b else 1.0


def _share(error: float) -> None:
    if not 0 < error < 1:
        raise DataError(f"an error lies strictly between 0 and 1, not {error}")
