"""How much dropout a network bears that was not trained with it: the label-free ε-rule.

The rule of training-free Bayesianization (Shi et al. 2024, arXiv:2412.05723): as much noise as
leaves the predictions where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posthoc.contract import F64, Array, FitError, Task
from posthoc.frozen import Frozen
from posthoc.links import softmax
from posthoc.network.attach import MEMBERS, PROBE, NetworkRows, channel_axis
from posthoc.network.fold import Noise, sampled, separate
from posthoc.pixels import pixels
from posthoc.runtime import open_session

LARGEST = 0.9  # of the rates that are considered
LEAST = 1e-5
_STEPS = 12  # halvings of the range, on a logarithmic scale
_PASSES = 256  # rows that the network sees in one run

Masks = Callable[[Sequence[float]], Mapping[str, Noise]]
Distance = Callable[[float], dict[str, float]]


def distance(frozen: Frozen, masks: Masks, sites: int, rows: NetworkRows, task: Task) -> Distance:
    """How far the mixture at one rate for all ``sites`` is from the frozen prediction: the mean
    ``total_variation`` and the share of ``flips``; or ``relative_std``, the mean over outputs and
    rows of what the members' distance from the frozen output is (root mean square over members),
    in standard deviations of that output over the rows. No label is read."""
    axis = channel_axis(frozen)
    first = masks([0.0] * sites)
    count = next(len(n.terms()["gain"]) for n in first.values())
    session = _session(frozen, first, axis, rows)
    block = max(1, _PASSES // count)

    def members(rate: float) -> Any:
        noise = {f"{t}/gain": n.terms()["gain"] for t, n in masks([rate] * sites).items()}
        for i in range(0, len(rows), block):
            part = rows.take(slice(i, i + block)).inputs
            z, found = session.run([frozen.z, MEMBERS], {**part, **noise})
            yield _flat(z, axis), np.stack([_flat(m, axis) for m in separate(found, count, axis)])

    def classes(rate: float) -> dict[str, float]:
        variation = turned = 0.0
        n = 0
        for z, each in members(rate):
            p, q = softmax(_pair(z)), softmax(_pair(each)).mean(0)
            variation += float(0.5 * np.abs(p - q).sum())
            turned += float((p.argmax(1) != q.argmax(1)).sum())
            n += len(z)
        return {"total_variation": variation / n, "flips": turned / n}

    def values(rate: float) -> dict[str, float]:
        moved = total = squares = np.zeros(frozen.z_dim)
        shift: Array | None = None
        n = 0
        for z, each in members(rate):
            shift = z[0] if shift is None else shift
            moved = moved + np.sqrt(((each - z) ** 2).mean(0)).sum(0)
            total, squares = total + (z - shift).sum(0), squares + ((z - shift) ** 2).sum(0)
            n += len(z)
        std = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0.0))
        varies = std > 0
        relative = np.divide(moved / n, std, out=np.zeros_like(moved), where=varies)
        return {"relative_std": float(relative.sum() / max(varies.sum(), 1))}

    return classes if task == "classification" else values


def largest(distances: Distance, epsilon: float, samples: int) -> tuple[float, dict[str, Any]]:
    """(rate, what is to be said of it): the largest within ``epsilon`` that a bisection from 1/S
    finds, at most 0.9 and 1 - 1/S. Raises FitError where even a rate of 1e-5 is beyond it."""

    def within(rate: float) -> bool:
        return max(distances(rate).values()) <= epsilon

    most = min(LARGEST, 1.0 - 1.0 / samples)
    low, high = min(1.0 / samples, most), most
    while not within(low):
        low, high = low / 4, low
        if low < LEAST:
            raise FitError(
                f"mc_dropout: dropping a single unit moves the predictions by more than "
                f"epsilon={epsilon:g}; give a rate, a larger epsilon or more samples"
            )
    said: dict[str, Any] = {"epsilon": epsilon, "uncalibrated": True}
    if high == most and within(high):
        return high, {**said, "rate_unlimited": True, **distances(high)}
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if within(middle) else (low, middle)
    return low, {**said, **distances(low)}


def _session(frozen: Frozen, noises: Mapping[str, Noise], axis: int, rows: NetworkRows) -> Any:
    """The sampled network with its masks as inputs, z beside the members."""
    import onnx

    from posthoc.model.probe import with_outputs

    probe = rows.take(slice(0, PROBE)).inputs
    model = sampled(frozen.model, frozen.z, noises, MEMBERS, inputs=True, axis=axis, rows=probe)
    return open_session(with_outputs(onnx.load_from_string(model), [frozen.z]))


def _flat(z: Array, axis: int) -> F64:
    return pixels(z, axis).reshape(-1, z.shape[axis]).astype(np.float64)


def _pair(z: F64) -> F64:
    """One logit as that of the second of two classes."""
    return z if z.shape[-1] > 1 else np.concatenate([np.zeros_like(z), z], -1)
