"""Risk control for dense outputs: a threshold on pixel scores whose promise is about images.

Pixels of one image are no independent evidence, so a rank among pooled pixels promises nothing.
What is exchangeable is the image (or the subject, when a row below holds all of a subject's
pixels), and its loss at a threshold λ is the share of its pixels with score > λ: pixels outside
their interval or set. λ grows, the loss falls, at λ = +inf it is 0. Two promises are offered.

Conformal risk control (Angelopoulos, Bates, Fisch, Lei & Schuster 2022, arXiv:2208.02814, eq. 4
and Theorem 1): the smallest λ with ``n/(n+1) R(λ) + 1/(n+1) <= alpha``, R being the mean loss of n
images, gives ``E[loss of a new image] <= alpha``. Risk-controlling prediction sets (Bates et al.
2021, arXiv:2101.02703, Theorem 1; as fixed-sequence testing, Angelopoulos et al. 2021,
arXiv:2110.01052): testing ``risk > alpha`` at every λ from the largest down until the
Hoeffding-Bentkus p-value exceeds delta gives ``P(risk > alpha) <= delta`` over the draw of the n
images. Both come down to the smallest λ at which the n losses sum to at most a budget, which is a
score of the images: the comparison ``score <= λ`` in float32 covers exactly the pixels meant here.

A uniform random sample of an image's pixels keeps both promises for the whole image. Let L(λ) be
the image's loss and S(λ) that of its sample: ``E[S(λ) | image] = L(λ)`` at every λ, since L is a
plain mean over pixels. Pairs (image, sample) are exchangeable as images are, so the theorem holds
for S; λ depends on other images only, hence ``E[S(λ)] = E[L(λ)]`` for the new one. For a ratio such
as the false-negative rate this fails under uniform sampling: a sample without any positive pixel
counts 0, so ``E[S | image] = P(sample has a positive) L < L``. Sample the positives themselves
(``sample_pixels(..., counted=positive)``): their plain mean is the false-negative rate again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from calibration.threshold import neyman_pearson_rows
from posthoc.contract import F64, Array, DataError

_ROUNDING = 1e-9  # of a sum of losses: (n+1)*alpha - 1 can land a hair below an integer


@dataclass(frozen=True, slots=True)
class RiskPromise:
    """What one threshold promises for a new image drawn like the n of calibration.

    ``delta`` None: the mean loss of a new image is at most ``alpha`` (over calibration and image
    together). Else: with probability at least 1-delta over calibration, the mean loss of new
    images is at most ``alpha``. A loss is the share of an image's counted pixels with score above
    ``threshold``, 0 for an image without any; ``counted`` of the ``n`` images had some.
    """

    alpha: float
    delta: float | None
    n: int
    counted: int
    n_needed: int
    threshold: float  # +inf where n < n_needed: every pixel is covered
    risk: float  # mean loss of the n images at the threshold


def needed(alpha: float, delta: float | None = None) -> int:
    """The fewest images with which a finite threshold can hold the promise.

    ``1/alpha - 1`` for the mean; ``ln(delta)/ln(1-alpha)`` with confidence 1-delta. Raises
    DataError for a level outside (0, 1).
    """
    _levels(alpha, delta)
    if delta is not None:
        return neyman_pearson_rows(alpha, delta)
    return math.ceil(round(1 / alpha - 1, 9))


def loss_budget(n: int, alpha: float, delta: float | None = None) -> float:
    """The largest sum of n losses in [0, 1] that keeps the promise; negative for too few images.

    ``(n+1) alpha - 1`` for the mean. With confidence 1-delta, n times the largest mean loss whose
    Hoeffding-Bentkus p-value is at most delta (``hoeffding_bentkus``).
    """
    _levels(alpha, delta)
    if n < needed(alpha, delta):
        return -1.0
    if delta is None:
        return max(0.0, (n + 1) * alpha - 1)
    return max(_bentkus_budget(n, alpha, delta), _hoeffding_budget(n, alpha, delta))


def hoeffding_bentkus(risk: float, n: int, alpha: float) -> float:
    """p-value of "the risk is above alpha" for a mean loss ``risk`` of n losses in [0, 1].

    ``min(exp(-n h(min(R, a), a)), e P(Binomial(n, a) <= ceil(n R)))`` with h the relative entropy
    of two coins (Bates et al. 2021, Theorem 4 and section 3.1).
    """
    hoeffding = math.exp(-n * _relative_entropy(min(risk, alpha), alpha))
    bentkus = math.e * float(binom.cdf(math.ceil(n * risk - _ROUNDING), n, alpha))
    return min(1.0, hoeffding, bentkus)


def control_risk(
    scores: Array,
    alphas: Sequence[float],
    *,
    weights: Array | None = None,
    delta: float | None = None,
) -> tuple[RiskPromise, ...]:
    """The threshold of each level from pixel scores n×P, a row an image (or subject).

    NaN marks a place without a pixel, so images may differ in size. ``weights`` (n×P, bool or
    numbers >= 0) says what a pixel counts within its image: for false-negative control of a class
    it is where the class is, and the mask ``score <= threshold`` misses at most a share alpha of
    it on average. Images without any counted pixel have loss 0 and still count in n: leave them
    out for a promise over images that have some. Give the scores in the dtype, float32, that will
    be compared with the threshold: the threshold is one of them, the smallest that keeps the
    promise (the smallest score where even covering nothing would keep it), or +inf for too few
    images. Each promise holds singly.

    Raises DataError for scores that are no n×P floats, weights of another shape or below 0, a
    level outside (0, 1), or where no pixel of any image counts.
    """
    s, w = _pixels(scores, weights)
    counts = _counts(s, w)
    n, counted = len(s), int((counts > 0).sum())
    if not counted:
        raise DataError("no image has a pixel that counts, so no threshold can be found")
    ascending, above = _pooled(s, w, counts)
    promises = []
    for alpha in alphas:
        budget = loss_budget(n, alpha, delta)
        # Below the first pixel that breaks the budget (from the top) lies no admissible threshold;
        # at it the losses sum to less than before it, whatever is tied with it.
        first = int(np.searchsorted(above, budget + _ROUNDING, side="right"))
        threshold = math.inf if budget < 0 else float(ascending[max(0, len(ascending) - 1 - first)])
        risk = float(image_losses(s, threshold, weights=w).mean())
        promises.append(
            RiskPromise(alpha, delta, n, counted, needed(alpha, delta), threshold, risk)
        )
    return tuple(promises)


def image_losses(scores: Array, threshold: float, *, weights: Array | None = None) -> F64:
    """Share of each image's counted pixels with score above ``threshold``, n; 0 where none count.

    ``scores`` n×P and ``weights`` as in ``control_risk``.
    """
    s, w = _pixels(scores, weights)
    outside = s > threshold  # a NaN is above nothing
    missed = np.count_nonzero(outside, axis=1) if w is None else (w * outside).sum(axis=1)
    counts = _counts(s, w)
    losses: F64 = np.divide(missed, counts, out=np.zeros(len(s)), where=counts > 0)
    return losses


def sample_pixels(
    scores: Array, size: int, rng: np.random.Generator, *, counted: Array | None = None
) -> Array:
    """A row for ``control_risk``: ``size`` scores of one image (any shape), drawn uniformly.

    Without replacement, from the places that are no NaN and, where ``counted`` (bool, the shape
    of scores) is given, are counted; all of them, filled up with NaN, where there are fewer.
    """
    flat = np.asarray(scores).reshape(-1)
    usable = ~np.isnan(flat)
    if counted is not None:
        mask = np.asarray(counted, dtype=bool)
        if mask.shape != np.shape(scores):
            raise DataError(f"counted has shape {mask.shape} for scores {np.shape(scores)}")
        usable &= mask.reshape(-1)
    places = np.flatnonzero(usable)
    if len(places) > size:
        places = places[rng.choice(len(places), size, replace=False, shuffle=False)]
    row = np.full(size, np.nan, dtype=flat.dtype)
    row[: len(places)] = flat[places]
    return row


def _pooled(s: Array, w: Array | None, counts: F64) -> tuple[Array, F64]:
    """All counted scores, ascending, and from the largest down the sum of losses they make."""
    if w is None and (counts == counts[0]).all():
        flat = s.reshape(-1)
        ascending = np.sort(flat)[: int(counts.sum())]  # NaN sorts last
        # Every pixel weighs the same: a count, which does not round as a running sum does.
        return ascending, np.arange(1, len(ascending) + 1) / counts[0]
    weight = ~np.isnan(s) if w is None else w
    keep = weight > 0
    shares = (weight / np.where(counts > 0, counts, 1.0)[:, None])[keep]
    flat = s[keep]
    order = np.argsort(flat)
    above: F64 = np.cumsum(shares[order][::-1])
    return flat[order], above


def _pixels(scores: Array, weights: Array | None) -> tuple[Array, Array | None]:
    """Scores as given and weights as float64, 0 where there is no pixel."""
    s = np.asarray(scores)
    if s.ndim != 2 or s.dtype.kind != "f":
        raise DataError(f"pixel scores are n×P floats, not {s.dtype} of shape {s.shape}")
    if weights is None:
        return s, None
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != s.shape:
        raise DataError(f"weights have shape {w.shape} for scores {s.shape}")
    w = np.where(np.isnan(s), 0.0, w)
    bad = ~((w >= 0) & np.isfinite(w)).all(axis=1)
    if bad.any():
        raise DataError(f"image {int(bad.argmax())}: a weight is negative, infinite or NaN")
    return s, w


def _counts(s: Array, w: Array | None) -> F64:
    """Sum of weights of each image's pixels, n."""
    counts: F64 = (s.shape[1] - np.count_nonzero(np.isnan(s), axis=1)).astype(np.float64)
    return counts if w is None else np.asarray(w.sum(axis=1))


def _levels(alpha: float, delta: float | None) -> None:
    for name, level in (("alpha", alpha), ("delta", delta)):
        if level is not None and not 0 < level < 1:
            raise DataError(f"{name} must lie strictly between 0 and 1, not {level}")


def _relative_entropy(a: float, b: float) -> float:
    """``a ln(a/b) + (1-a) ln((1-a)/(1-b))`` for a in [0, 1], b in (0, 1)."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def _bentkus_budget(n: int, alpha: float, delta: float) -> float:
    """Largest whole k with ``e P(Binomial(n, alpha) <= k) <= delta``; -1 for none."""
    k = int(binom.ppf(delta / math.e, n, alpha))
    while k >= 0 and math.e * binom.cdf(k, n, alpha) > delta:
        k -= 1
    return float(k)


def _hoeffding_budget(n: int, alpha: float, delta: float) -> float:
    """Largest ``n r`` with ``exp(-n h(r, alpha)) <= delta``, for n at least the number needed."""
    low, high = 0.0, alpha  # h falls from -ln(1-alpha) at 0 to 0 at alpha
    for _ in range(60):
        middle = (low + high) / 2
        passes = math.exp(-n * _relative_entropy(middle, alpha)) <= delta
        low, high = (middle, high) if passes else (low, middle)
    return n * low
