"""Conformal test martingales: evidence, at any time, that a stream is no longer like its reference.

Each score gets its rank among reference and past stream scores, a p-value. While scores are
exchangeable these are independent and uniform, and nobody who bets on them wins: the capital of
one who starts with 1 reaches L, ever, with probability at most 1/L (Ville). Vovk, Petej,
Nouretdinov, Ahlberg, Carlsson & Gammerman 2021, "Retrain or not retrain: conformal test
martingales for change-point detection", COPA; Vovk, Gammerman & Shafer 2022, "Algorithmic
learning in a random world", part III.

**p-values.** A histogram holds all that ranks need. Its edges are order statistics of the
reference, so that a bin with g gaps between reference scores has g/(n+1) of the probability of the
next score, and with N_b of t stream scores in it, (g_b + N_b)/(n+1+t) (Pólya's urn, exactly, since
the spacings of uniform order statistics are a Dirichlet draw). A score's place within its bin is
drawn. Counting reference *scores* in bins whose edges are theirs would not be exact. Equal scores
are ordered by a random number each, as pairs (score, number), which are never tied.

**Bets.** The simple jumper of the paper: three gamblers bet 1 + e(p - 1/2), e -1, 0
and 1, and a share R of all capital is dealt out anew before each bet. The composite is the mean of
jumpers over the rates R; one more has R = 1/t, which loses little in a long healthy time. Half of
the capital bets on p, which moves with scores, half on |2p - 1|, which moves with their spread.

Scores that follow each other (a day and its night, one customer's rows together) are not
exchangeable, and alarm without any other change: average or whiten them first.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from calibration.drift.saved import Saved, read, text_of
from posthoc.contract import F64, I64, Array, DataError

NAME = "martingale"
BINS = 64
RATES = (0.01, 0.001)  # of the jumpers; one more jumps at the rate 1/t

_BLOCK = 1024  # scores whose counts are held at a time
_LARGE, _SMALL, _SHIFT = 2.0**256, 2.0**-256, 256
_STREAM, _REFERENCE = 0, 1  # second words of the generator's key
_LIMIT = float(np.finfo(np.float64).max)

Account = tuple[float, float, float]  # capital of the gamblers with e = -1, 0, 1


@dataclass(frozen=True, slots=True)
class Martingale:
    """What is known of one stream.

    ``edges``, B-1 ascending scores, and ``ties``, their random numbers in [0, 1), lie between B
    bins; ``counts`` B: gaps of the reference and stream scores in each. ``accounts``: capital in
    units of 2^exponent of the jumpers that bet on p, then of those that bet on |2p - 1|; ``rates``
    theirs, the jumper with 1/t coming last. ``seen`` stream scores; ``log10_capital`` now and
    ``log10_peak`` its maximum, at least 0. Random numbers are Philox's, by the key ``seed`` and a
    counter that follows ``seen``: a restored state goes on as the one that was saved.
    """

    edges: tuple[float, ...]
    ties: tuple[float, ...]
    counts: tuple[int, ...]
    rates: tuple[float, ...]
    accounts: tuple[Account, ...]
    seed: int
    exponent: int = 0
    seen: int = 0
    log10_capital: float = 0.0
    log10_peak: float = 0.0

    def alarm(self, alpha: float) -> bool:
        """Whether the capital has ever reached 1/alpha: in a healthy stream, however long, with
        probability at most alpha."""
        return self.log10_peak >= -math.log10(alpha)


class _Saved(Saved):
    edges: tuple[float, ...]
    ties: tuple[float, ...]
    counts: tuple[int, ...]
    rates: tuple[float, ...]
    accounts: tuple[Account, ...]
    seed: int
    exponent: int
    seen: int
    log10_capital: float
    log10_peak: float


def to_json(state: Martingale) -> str:
    """One line of JSON, from which ``from_json`` makes an equal state, to the last bit."""
    return text_of(_Saved(detector=NAME, **asdict(state)))


def from_json(text: str) -> Martingale:
    """The inverse of ``to_json``. Raises DataError for anything else."""
    saved = read(_Saved, NAME, text)
    state = Martingale(**saved.model_dump(exclude={"detector", "version"}))
    between, accounts = len(state.counts) - 1, 2 * (len(state.rates) + 1)
    if not len(state.edges) == len(state.ties) == between or len(state.accounts) != accounts:
        raise DataError("the parts of a saved martingale do not match: start a new one")
    return state


def start(reference: Array, *, seed: int = 0, rates: tuple[float, ...] = RATES) -> Martingale:
    """A martingale with capital 1 for scores like the n of ``reference``, in any order and scale.

    ``rates`` of the jumpers lie in (0, 1]. Streams may share a ``seed``. Raises DataError for no
    reference, a NaN in it, and a rate or seed out of range.
    """
    x = _scores(reference, "reference row")
    n = len(x)
    if not n:
        raise DataError("a martingale needs reference scores and there are none")
    if not all(0 < r <= 1 for r in rates):
        raise DataError(f"rates of jumpers lie in (0, 1], which {rates} do not")
    if not 0 <= seed < 2**64:
        raise DataError(f"a seed lies between 0 and 2^64 - 1, which {seed} does not")
    number = _uniform(seed, _REFERENCE, 0, n)
    order = np.lexsort((number, x))
    bins = min(BINS, n + 1)
    ranks = np.round(np.arange(1, bins) * (n + 1) / bins).astype(np.int64)  # from 1, ascending
    gaps = np.diff(np.concatenate([[0], ranks, [n + 1]]))
    chosen = order[ranks - 1]
    accounts = 2 * (len(rates) + 1)
    each = 1 / (3 * accounts)
    return Martingale(
        edges=tuple(x[chosen].tolist()),
        ties=tuple(number[chosen].tolist()),
        counts=tuple(gaps.tolist()),
        rates=tuple(map(float, rates)),
        accounts=((each, each, each),) * accounts,
        seed=seed,
    )


def run(state: Martingale, scores: Array) -> tuple[Martingale, F64]:
    """(the state after T more scores, log10 of the capital after each of them).

    The same, to the last bit, however the stream is cut into pieces. Raises DataError for a score
    that is NaN, naming the row.
    """
    p, counts = pvalues(state, scores)
    return bet(replace(state, counts=tuple(counts.tolist())), p)


def pvalues(state: Martingale, scores: Array) -> tuple[F64, I64]:
    """(p-values of T more scores, the counts B after them). Uniform and independent while stream
    and reference are exchangeable; small for small scores."""
    x = _scores(scores, "row")
    drawn = _uniform(state.seed, _STREAM, 2 * state.seen, 2 * len(x)).reshape(-1, 2)
    counts = np.asarray(state.counts, np.int64)
    p = np.empty(len(x))
    for first in range(0, len(x), _BLOCK):
        rows = slice(first, first + _BLOCK)
        b = _bins(state, x[rows], drawn[rows, 0])
        hit = np.zeros((len(b) + 1, len(counts)), np.int64)
        hit[np.arange(1, len(b) + 1), b] = 1
        before = np.cumsum(hit, axis=0) + counts
        here = np.arange(len(b))
        upto = np.cumsum(before[:-1], axis=1)
        inside = before[here, b]
        p[rows] = (upto[here, b] - inside + drawn[rows, 1] * inside) / upto[:, -1]
        counts = before[-1]
    return p, counts


def bet(state: Martingale, p: F64) -> tuple[Martingale, F64]:
    """(the state after bets on T p-values, log10 of the capital after each of them).

    ``run`` bets on ``pvalues``; nothing is promised of p-values from elsewhere.
    """
    k = len(state.rates) + 1
    accounts, rates = list(state.accounts), [*state.rates, 1.0] * 2
    exponent, seen, log10 = state.exponent, state.seen, state.log10_capital
    peak, path = state.log10_peak, np.empty(len(p))
    base = exponent * math.log10(2)
    spread = np.abs(2 * p - 1)
    for t, both in enumerate(zip(p.tolist(), spread.tolist(), strict=True)):
        seen += 1
        rates[k - 1] = rates[-1] = 1 / (seen + 1)
        total = 0.0
        for i, rate in enumerate(rates):
            low, mid, high = accounts[i]
            q = both[i >= k]
            dealt, kept = (low + mid + high) * rate / 3, 1 - rate
            low = (kept * low + dealt) * (1.5 - q)
            mid = kept * mid + dealt
            high = (kept * high + dealt) * (0.5 + q)
            accounts[i] = low, mid, high
            total += low + mid + high
        if not _SMALL < total < _LARGE:  # by a power of two, which rounds nothing
            shift = -_SHIFT if total >= _LARGE else _SHIFT
            accounts = [
                (math.ldexp(a, shift), math.ldexp(b, shift), math.ldexp(c, shift))
                for a, b, c in accounts
            ]
            total, exponent = math.ldexp(total, shift), exponent - shift
            base = exponent * math.log10(2)
        log10 = base + math.log10(total)
        path[t] = log10
        peak = max(peak, log10)
    new = replace(
        state,
        accounts=tuple(accounts),
        exponent=exponent,
        seen=seen,
        log10_capital=log10,
        log10_peak=peak,
    )
    return new, path


def _bins(state: Martingale, x: F64, number: F64) -> I64:
    """Bin of each score, N in 0…B-1: how many edges (score, number) lie below it."""
    edges = np.asarray(state.edges)
    values = np.unique(edges)
    # A score between values i-1 and i is 2i, one equal to value i is 2i + 1 + its number.
    at = 2 * np.searchsorted(values, edges) + 1 + np.asarray(state.ties)
    left = np.searchsorted(values, x, side="left")
    tied = np.searchsorted(values, x, side="right") > left
    return np.searchsorted(at, 2.0 * left + tied * (1 + number), side="right")


def _uniform(seed: int, stream: int, first: int, n: int) -> F64:
    """Numbers ``first`` to ``first + n`` of an endless row of uniform ones in [0, 1)."""
    key = np.asarray([seed, stream], np.uint64)
    skip = first % 4  # Philox makes four words a count
    words = np.random.Philox(key=key, counter=first // 4).random_raw(skip + n)
    return np.asarray((words[skip:] >> np.uint64(11)) * 2.0**-53)


def _scores(x: Array, what: str) -> F64:
    found = np.asarray(x, np.float64).reshape(-1)
    missing = np.isnan(found)
    if missing.any():
        raise DataError(f"{what} {int(np.argmax(missing))}: its score is NaN")
    return np.clip(found, -_LIMIT, _LIMIT)  # an infinite edge would be no JSON
