"""Batched L-BFGS: many strictly convex problems of one shape, minimised side by side.

Each problem has its own curvature pairs, its own step lengths and its own end; they share the
evaluations, which is where the time goes. Nocedal & Wright 2006, "Numerical Optimization",
algorithms 7.4 and 7.5, with Armijo backtracking: where the problem is strictly convex every step
shows positive curvature, so that the second Wolfe condition is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posthoc.contract import F64, I64, Array

ARMIJO = 1e-4
SHORTENINGS = 12
NOISE = 1e-6  # of the value: sums in float32 cannot tell a smaller change from none
MEMORY = 6

# (points S×P, their problems S) -> (values S in float64, gradients S×P)
Objective = Callable[[Array, I64], tuple[F64, Array]]


class Coordinates(Protocol):
    """A linear change of variables x = T u after which the problems are well scaled."""

    def forward(self, u: Array) -> Array:
        """T u: S×R to S×P."""

    def gradient(self, g: Array) -> Array:
        """T' g: S×P to S×R."""


@dataclass(frozen=True, slots=True)
class Minimum:
    """Points ``x`` S×P and their ``value`` S; ``gradient`` S is the norm of T' g as a share of
    what it was at the start; ``converged`` S says that it fell to the tolerance."""

    x: Array
    value: F64
    gradient: F64
    converged: Array
    iterations: int


def minimise(
    objective: Objective,
    start: Array,
    coordinates: Coordinates,
    *,
    iterations: int,
    tolerance: float,
) -> Minimum:
    """Minimise S problems from ``start`` S×P, each until the norm of T' g is ``tolerance`` of its
    first value, no step lowers it, or ``iterations`` steps are done.

    Holds 2·MEMORY + 8 arrays of S×P numbers of the start's type beside the objective's own.
    """
    x = start.copy()
    value, g = objective(x, np.arange(len(x)))
    u = coordinates.gradient(g)
    del g
    first = _norm(u)
    active = first > 0
    pairs = _Pairs(u)
    step = 0
    while step < iterations and active.any():
        step += 1
        direction = pairs.direction(u)
        slope = _dot(direction, u)
        who = np.flatnonzero(active)
        move = coordinates.forward(direction[who])
        length, waiting = np.ones(len(who)), np.arange(len(who))
        pairs.turn()
        for _ in range(SHORTENINGS):
            at = who[waiting]
            t = length[waiting]
            trial = x[at] + t[:, None].astype(x.dtype) * move[waiting]
            found, g = objective(trial, at)
            fresh = coordinates.gradient(g)
            del g
            gain, bound = found - value[at], t * slope[at]
            flat = np.abs(gain) <= NOISE * np.abs(value[at])
            level = _dot(fresh, direction[at]) <= (2 * ARMIJO - 1) * slope[at]
            enough = (gain <= ARMIJO * bound) | (flat & level)
            done = at[enough]
            x[done], value[done] = trial[enough], found[enough]
            del trial
            pairs.put(
                done,
                t[enough, None].astype(u.dtype) * direction[done],
                fresh[enough] - u[done],
            )
            u[done] = fresh[enough]
            # The minimum of the parabola through both values and the slope, safeguarded.
            bend = np.where(enough, 1.0, np.maximum(gain - bound, 1e-300))
            length[waiting] = np.clip(-0.5 * t * bound / bend, 0.1 * t, 0.5 * t)
            waiting = waiting[~enough]
            if not len(waiting):
                break
        active[who[waiting]] = False
        active &= 0.5 * _norm(u) ** 2 > tolerance * value
    share = 0.5 * _norm(u) ** 2 / value
    return Minimum(x, value, share, share <= tolerance, step)


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
        """Pairs of some problems into the current slot."""
        bend, size = _dot(s, y), _dot(y, y)
        good = bend > 1e-12 * np.sqrt(_dot(s, s) * size)
        problems = problems[good]
        self._s[self._slot, problems] = s[good]
        self._y[self._slot, problems] = y[good]
        self._weight[self._slot, problems] = 1.0 / bend[good]
        self._scale[problems] = bend[good] / size[good]

    def direction(self, u: Array) -> Array:
        """Minus the inverse Hessian times gradients S×R."""
        q = -u
        order = [(self._slot - j) % MEMORY for j in range(MEMORY)]
        alpha = np.zeros_like(self._weight)
        for j in order:
            alpha[j] = self._weight[j] * _dot(self._s[j], q)
            q -= alpha[j][:, None].astype(q.dtype) * self._y[j]
        q *= self._scale[:, None].astype(q.dtype)
        for j in reversed(order):
            beta = self._weight[j] * _dot(self._y[j], q)
            q += (alpha[j] - beta)[:, None].astype(q.dtype) * self._s[j]
        return q


def _dot(a: Array, b: Array) -> F64:
    return np.einsum("sp,sp->s", a, b).astype(np.float64)


def _norm(a: Array) -> F64:
    return np.asarray(np.sqrt(_dot(a, a)))
