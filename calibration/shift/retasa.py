"""ReTaSA: weights of continuous targets whose distribution has moved, from rows without labels.

With the law of x given y unchanged, rho = w - 1 solves E_source[rho(y) | x] = p_t(x)/p_s(x) - 1, an
integral equation of the first kind, which is regularised: rho = (a I + B A)⁻¹ B (eta - 1), A and B
kernel regressions on x and on y (Kim, Lee, Kang & Cho 2024, "ReTaSA: a nonparametric functional
estimation approach for addressing continuous target shift", ICLR). x is the model's own output.
"""

from __future__ import annotations

import numpy as np

from calibration.shift.density_ratio import check_overlap
from posthoc.contract import F64, Array, FitError

# For coverage a small one is right, though another has a smaller error in the weights; of the grid
# the one whose weighted source mean and spread of x are nearest to production's.
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
ROWS = 1500  # of either sample: a system of so many equations is solved for each of the grid


def retasa(x: Array, y: Array, target: Array, seed: int = 0) -> F64:
    """Weights N of mean one for source rows with outputs x N and targets y N, from production
    outputs M. More than ROWS are weighed by a sample and the weights of their nearest targets.

    Raises FitError for fewer than 20 rows of either sample, values that are not finite, and where
    production outputs lie where labelled ones do not.
    """
    x, y, t = (np.asarray(v, np.float64).reshape(-1) for v in (x, y, target))
    if min(len(x), len(t)) < 20:
        raise FitError(f"{len(x)} labelled and {len(t)} production rows are too few for a shift")
    if not all(np.isfinite(v).all() for v in (x, y, t)):
        raise FitError("an output or a target is not finite")
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.permutation(len(x))[:ROWS])
    t = t[np.sort(rng.permutation(len(t))[:ROWS])]
    xs, ys = x[kept], y[kept]
    a, b = _smoother(xs), _smoother(ys)
    eta = _density(xs, t) / np.maximum(_density(xs, xs), 1e-12)
    check_overlap(float(eta.mean()))
    eta /= eta.mean()
    wanted = np.asarray([t.mean(), t.std()])
    best = None
    for ridge in GRID:
        rho = np.linalg.solve(ridge * np.eye(len(xs)) + b @ a, b @ (eta - 1.0))
        w = np.maximum(rho + 1.0, 0.0)
        if not w.any():
            continue
        w /= w.mean()
        mean = float((w * xs).mean())
        spread = float(np.sqrt(max((w * (xs - mean) ** 2).mean(), 0.0)))
        off = float(np.abs(np.asarray([mean, spread]) - wanted).sum())
        if best is None or off < best[0]:
            best = (off, w)
    if best is None:
        raise FitError("no weights make the labelled rows look like the production rows")
    order = np.argsort(ys, kind="stable")
    out = np.interp(y, ys[order], best[1][order])
    return np.asarray(out / out.mean())


def bandwidth(x: Array) -> float:
    """Silverman's rule of thumb for a Gaussian kernel."""
    q = np.quantile(x, [0.25, 0.75])
    spread = min(float(np.std(x)), float(q[1] - q[0]) / 1.349) or float(np.std(x)) or 1.0
    return float(0.9 * spread * len(x) ** -0.2)


def _kernel(a: F64, b: F64, h: float) -> F64:
    return np.exp(-0.5 * ((a[:, None] - b[None, :]) / h) ** 2)


def _smoother(x: F64) -> F64:
    k = _kernel(x, x, bandwidth(x))
    return np.asarray(k / k.sum(1, keepdims=True))


def _density(at: F64, sample: F64) -> F64:
    h = bandwidth(sample)
    return np.asarray(_kernel(at, sample, h).mean(1) / h)
