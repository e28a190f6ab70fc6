"""Batched L-BFGS: many strictly convex problems of one shape, minimised side by side.

Each problem has its own curvature pairs, its own step lengths and its own end; they share the
evaluations, which is where the time goes. Nocedal & Wright 2006, "Numerical Optimization",
algorithms 7.4 and 7.5, with Armijo backtracking: a strictly convex problem shows positive
curvature along every step, so that the second Wolfe condition is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posthoc.contract import F64, I64, Array

ARMIJO = 1e-4
SHORTENINGS = 12  # of a step, each to a tenth or more
NOISE = 1e-6  # of a value: what sums in float32 cannot tell from no change
MEMORY = 8  # curvature pairs
RUN = 4096

# (points S×P, their problems S) -> (values S in float64, gradients S×P)
Objective = Callable[[Array, I64], tuple[F64, Array]]


class Coordinates(Protocol):
    """A linear change of variables x = T u after which the problems are well scaled."""

    def forward(self, u: Array) -> Array:
        """T u, S×P to S×P."""

    def gradient(self, g: Array) -> Array:
        """T' g, S×P to S×P."""


@dataclass(frozen=True, slots=True)
class Minimum:
    """Points ``x`` S×P, ``value`` S and ``gradient`` S, the norm of T' g: where T makes the
    Hessian the identity, half its square is the distance of the value from its minimum.
    ``converged`` S says that this distance fell to the tolerance."""

    x: Array
    value: F64
    gradient: F64
    converged: Array
    steps: int


def minimise(
    objective: Objective,
    start: Array,
    coordinates: Coordinates,
    *,
    steps: int,
    tolerance: float,
) -> Minimum:
    """Minimise S problems from ``start`` S×P, each until half the squared norm of T' g is at most
    ``tolerance``, no step lowers its value, or ``steps`` are done.

    Holds 2·MEMORY + 8 arrays of S×P numbers of the start's type beside the objective's own.
    """
    x = start.copy()
    value, g = objective(x, np.arange(len(x)))
    u = coordinates.gradient(g)
    del g
    pairs = _Pairs(u)
    active = _distance(u) > tolerance
    done = 0
    while done < steps and active.any():
        done += 1
        direction = pairs.direction(u)
        who = np.flatnonzero(active)
        slope = dot(direction, u)
        move = coordinates.forward(direction[who])
        length, waiting = np.ones(len(who)), np.arange(len(who))
        pairs.turn()
        for _ in range(SHORTENINGS):
            at, t = who[waiting], length[waiting]
            trial = x[at] + _column(t, x) * move[waiting]
            found, g = objective(trial, at)
            fresh = coordinates.gradient(g)
            del g
            gain, linear = found - value[at], t * slope[at]
            # Too near the minimum to see a gain in the value, the slope still shows it (Hager &
            # Zhang 2005, "A new conjugate gradient method with guaranteed descent", eq. 4.1).
            level = dot(direction[at], fresh) <= (2 * ARMIJO - 1) * slope[at]
            unseen = np.abs(gain) <= NOISE * np.abs(value[at])
            enough = (gain <= ARMIJO * linear) | (unseen & level)
            taken = at[enough]
            x[taken], value[taken] = trial[enough], found[enough]
            step = _column(t[enough], u) * direction[taken]
            pairs.put(taken, step, fresh[enough] - u[taken])
            u[taken] = fresh[enough]
            # On to the minimum of the parabola through both values and the slope, safeguarded.
            bend = np.where(enough, 1.0, gain - linear)
            with np.errstate(divide="ignore", invalid="ignore"):
                length[waiting] = np.clip(-0.5 * t * linear / bend, 0.1 * t, 0.5 * t)
            waiting = waiting[~enough]
            if not len(waiting):
                break
        active[who[waiting]] = False  # stuck
        active &= _distance(u) > tolerance
    return Minimum(x, value, np.sqrt(dot(u, u)), _distance(u) <= tolerance, done)


class _Pairs:
    """The last steps s and changes of gradient y of every problem, in a ring of slots that all
    problems turn together; a problem without a pair in a slot has weight 0 there."""

    def __init__(self, like: Array):
        self._s = np.zeros((MEMORY, *like.shape), like.dtype)
        self._y = np.zeros_like(self._s)
        self._weight = np.zeros((MEMORY, len(like)))  # 1 / s'y
        self._scale = np.ones(len(like))  # s'y / y'y of the newest pair
        self._slot = 0

    def turn(self) -> None:
        """On to the next slot, forgetting what it held."""
        self._slot = (self._slot + 1) % MEMORY
        self._weight[self._slot] = 0.0

    def put(self, problems: I64, s: Array, y: Array) -> None:
        """Pairs of some problems into the current slot; one that rounding bent is left out."""
        bend, size = dot(s, y), dot(y, y)
        good = bend > 1e-10 * np.sqrt(dot(s, s) * size)
        problems = problems[good]
        self._s[self._slot, problems] = s[good]
        self._y[self._slot, problems] = y[good]
        self._weight[self._slot, problems] = 1.0 / bend[good]
        self._scale[problems] = bend[good] / size[good]

    def direction(self, u: Array) -> Array:
        """Minus the approximate inverse Hessian times gradients S×P: the two-loop recursion."""
        q = -u
        order = [(self._slot - j) % MEMORY for j in range(MEMORY)]
        alpha = np.zeros_like(self._weight)
        for j in order:
            alpha[j] = self._weight[j] * dot(self._s[j], q)
            q -= _column(alpha[j], q) * self._y[j]
        q *= _column(self._scale, q)
        for j in reversed(order):
            beta = self._weight[j] * dot(self._y[j], q)
            q += _column(alpha[j] - beta, q) * self._s[j]
        return q


def _distance(u: Array) -> F64:
    return 0.5 * dot(u, u)


def _column(values: F64, like: Array) -> Array:
    return values.astype(like.dtype)[:, None]


def dot(a: Array, b: Array) -> F64:
    """Scalar products of the rows of S×P arrays, summed in float64 after every RUN numbers: a
    float32 sum of millions would be wrong in the fifth digit."""
    runs = a.shape[1] // RUN
    cut = runs * RUN
    blocked = [v[:, :cut].reshape(len(v), runs, RUN) for v in (a, b)]
    total = np.einsum("skp,skp->sk", *blocked).sum(1, dtype=np.float64)
    return np.asarray(total + np.einsum("sp,sp->s", a[:, cut:], b[:, cut:]))
