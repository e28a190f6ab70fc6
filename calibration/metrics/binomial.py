"""The exact interval of a share, from counts alone."""

from __future__ import annotations

from posthoc.contract import DataError


def share_interval(hits: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Where the probability lies of which ``hits`` of ``n`` independent rows are a draw.

    Clopper & Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of
    the binomial": covers with probability ``level`` or more, whatever the probability is. Raises
    DataError for no rows, and for hits that are none of 0…n.
    """
    from scipy.special import betaincinv  # here: who only counts needs no scipy

    if n < 1 or not 0 <= hits <= n:
        raise DataError(f"{hits} of {n} rows are no share")
    tail = (1 - level) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high
