"""Whether what the graph suggests is what the model did on the probe.

Values are those of the tensors that the walks name, on the rows of `posthoc.model.probe`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from posthoc.contract import Array, ModelError, Task
from posthoc.model.heads import Link, Step, Walk
from posthoc.model.linear import Found
from posthoc.model.probe import Probe, difference
from posthoc.model.quantised import Rounding

_PACKED = 1e-2  # relative; 2e-3 was seen with eight-bit weights
_KERNEL = 5e-7  # absolute, of probabilities: all a kernel promises, however small they are


def believed(
    walks: Sequence[Walk], values: Probe, output: str, task: Task, head: str | None
) -> tuple[Walk, str]:
    """The first walk whose z gives the output, and its z; a walk of no step when none does."""
    whole = values[output]
    for way in walks:
        for z in _tensors_of_z(way.path, values, whole):
            if _follows(way.steps, values[z], whole):
                return way, z
    if head is not None:
        raise ModelError(
            f"output {output!r} is neither the result of {head!r} nor its softmax, log-softmax or "
            "sigmoid; name another node"
        )
    if not 0 < whole.ndim <= 2 + _ones(whole) or whole.dtype.kind != "f":
        raise ModelError(
            f"output {output!r} has values {whole.dtype} of shape {whole.shape}; {task} takes one "
            "row of floats for each row (N×C)"
        )
    why = "the operators before the output are not what they seem"
    return Walk((), (), (), None, why), output


def _tensors_of_z(path: Sequence[str], values: Probe, output: Array) -> list[str]:
    """Tensors that may be z, the likeliest first: N×C, then N (a single output), then N×C with
    axes of one (a pooled map); the innermost first."""
    found: dict[int, list[str]] = {2: [], 1: [], 3: []}
    for name in reversed(path):
        value = values[name]
        if value.dtype.kind != "f" or value.shape[:1] != output.shape[:1]:
            continue
        if value.ndim in (1, 2):
            found[value.ndim].append(name)
        elif output.ndim <= 2 + _ones(output) and value.ndim <= 2 + _ones(value):
            found[3].append(name)
    return [*found[2], *found[1], *found[3]]


def _ones(value: Array) -> int:
    """Axes of one beside the batch, the first of a single output left out."""
    inner = value.shape[1:]
    return inner.count(1) - (math.prod(inner) == 1)


def _follows(steps: Sequence[Step], z: Array, output: Array) -> bool:
    """Whether the output is what ``steps`` make of z."""
    return apply_steps(steps, z.reshape(len(z), -1) if z.ndim > 2 else z, output)


def apply_steps(steps: Sequence[Step], z: Array, output: Array) -> bool:
    """Whether ``steps``, over the last axis of z, give the output."""
    value, tolerance = z.astype(np.float64), _tolerance(z, output)
    largest = max(float(np.abs(output).max(initial=0)), 1e-12) if steps else 1.0
    for step in steps:
        value = step(value) if isinstance(step, Rounding) else _step(step, value)
        if isinstance(step, Rounding):
            tolerance += step.scale / largest
        elif step in ("softmax", "sigmoid"):
            tolerance += _KERNEL / largest
    return value.size == output.size and difference(value, output) <= tolerance


def _step(step: Link, value: Array) -> Array:
    with np.errstate(all="ignore"):
        if step in ("softmax", "log_softmax"):
            value = value - value.max(axis=-1, keepdims=True)
            log: Array = value - np.log(np.exp(value).sum(axis=-1, keepdims=True))
            return log if step == "log_softmax" else np.exp(log)
        if step == "sigmoid":
            return 0.5 * (1 + np.tanh(value / 2))
        return np.asarray(np.log(value) if step == "log" else value.argmax(axis=-1))


def _tolerance(*values: Array) -> float:
    return 5e-3 if any(v.dtype == np.float16 for v in values) else 1e-4


def are_probabilities(values: Array) -> bool:
    """Rows of non-negative numbers that sum to 1; a single column within [0, 1]."""
    p = values.astype(np.float64).reshape(len(values), -1)
    p = p[np.isfinite(p).all(axis=1)]
    inside = len(p) > 0 and bool(((p >= 0) & (p <= 1 + 1e-3)).all())
    return inside and (p.shape[1] == 1 or bool(np.allclose(p.sum(axis=1), 1, atol=1e-3)))


def mismatch(values: Probe, found: Found, z: str) -> str:
    """Why φ Wᵀ + b is not z on the probe; empty when it is."""
    if found.phi not in values:
        return "the positions that the outputs are taken from cannot be taken from its input"
    phi, want, weight = values[found.phi], values[z], found.linear.weight
    if phi.ndim < 2 or phi.size != len(want) * weight.shape[1]:
        return f"its input has shape {phi.shape} and its weight {weight.shape}, not N×D and C×D"
    return mismatch_of(phi.reshape(len(want), -1), want.reshape(len(want), -1), found)


def mismatch_of(phi: Array, outputs: Array, found: Found) -> str:
    """Why φ Wᵀ + b is not z, for rows N×D and N×C; empty when it is."""
    weight = found.linear.weight
    with np.errstate(all="ignore"):
        got = phi.astype(np.float64) @ weight.T + found.linear.bias
    got = np.clip(got, found.low, found.high)
    want = outputs.astype(np.float64)
    if got.shape != want.shape:
        return f"it gives {got.shape} where the outputs are {want.shape}"
    finite = np.isfinite(got).all(axis=1) & np.isfinite(want).all(axis=1)
    if not finite.any():
        return "no row gives finite values to check it by; give real rows"
    got, want = got[finite], want[finite]
    largest = max(float(np.abs(want).max()), 1e-12)
    error = np.abs(got - want).max() / largest
    tolerance = _PACKED if found.packed else _tolerance(phi, outputs)
    if error <= tolerance + found.step / largest:
        return ""
    return f"φWᵀ + b differs from the outputs by {error:.1e}, relative to the largest"
