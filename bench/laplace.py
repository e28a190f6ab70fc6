"""``python -m bench laplace``: the last-layer Laplace predictive against laplace-torch 0.3.

Both sides hold the same posterior (same features, same prior precision, the bias as a block of its
own) and predict one batch from features to probabilities or to the full C×C covariance of the
logits, one thread each, in turn. The peer takes the batch size at which it is fastest per point;
ours takes the 32 that a service gathers. Our side is float32 in ONNX Runtime (`bench.applied`).
The head's weights have mean zero over classes, because ours centres logits before a link of each
class and laplace-torch does not.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import Worker, environment, exchange
from bench.timing import compared, in_turn, ratio
from posthoc.contract import Array, HedgedError

FEATURES = 512
ROWS = 2_000
BATCH = 32
PEER_BATCHES = {10: (1, 8, 32, 256), 100: (1, 4)}
PRIOR_PRECISION = 1.7
TOLERANCE = 1e-5


def run(quick: bool) -> dict[str, Any]:
    """Ratios of seconds a point and of peak memory, and the largest difference in float64."""
    found: dict[str, Any] = {}
    different: list[float] = []
    rounds = {10: 5 if quick else 15, 100: 3 if quick else 7}
    with exchange() as folder:
        for classes in (10, 100):
            path = folder / f"rows-{classes}.npz"
            problem(ROWS, FEATURES, classes).save(path)
            figures, difference = _kron(path, classes, rounds[classes])
            found |= figures
            different.append(difference["float64"])
            found[f"difference_c{classes}"] = difference
        found |= _diagonal(folder / "rows-10.npz", 2 * rounds[10])
        found |= _memory(folder / "rows-100.npz")
    found["max_abs_diff"] = max(different)
    if found["max_abs_diff"] > TOLERANCE:
        raise HedgedError(f"the two posteriors differ: {found['max_abs_diff']:.1e}")
    return found


@dataclass(frozen=True, slots=True)
class Problem:
    """``phi`` N×D float32, ``weight`` C×D and ``bias`` C float64, ``y`` N classes."""

    phi: Array
    weight: Array
    bias: Array
    y: Array

    def save(self, path: Path) -> None:
        """Write an ``.npz`` that both sides load."""
        np.savez(path, phi=self.phi, weight=self.weight, bias=self.bias, y=self.y)


def problem(rows: int, features: int, classes: int, seed: int = 0) -> Problem:
    """A made-up trained head over correlated, rectified features, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((features, features)) / np.sqrt(features)
    phi = np.maximum(rng.standard_normal((rows, features)) @ mix, 0).astype(np.float32)
    weight = rng.standard_normal((classes, features)) * (4 / np.sqrt(features))
    bias = rng.standard_normal(classes)
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    y = (phi @ weight.T + bias + rng.gumbel(size=(rows, classes))).argmax(1)
    return Problem(phi, weight, bias, y)


def sides(stack: ExitStack, path: Path, structure: str, dtype: str) -> tuple[Worker, Worker]:
    """(peer, ours), each with the rows loaded and the posterior fitted."""
    peer = stack.enter_context(Worker(environment("laplace-torch"), "bench.laplace_torch"))
    ours = stack.enter_context(Worker.here("bench.applied"))
    for side in (peer, ours):
        side.call("load", path=str(path), dtype=dtype)
        side.call("fit", structure=structure, prior_precision=PRIOR_PRECISION)
    return peer, ours


def _kron(path: Path, classes: int, rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        peer, ours = sides(stack, path, "kron", "float32")
        for what, key in (("probs", "kron"), ("covariance", "cov")):
            batch = _fastest(peer, what, PEER_BATCHES[classes])
            found |= _speed(f"{key}_c{classes}", peer, ours, what, batch, rounds)
        single = _answers(path, peer, ours, classes)
    with ExitStack() as stack:
        double = _answers(path, *sides(stack, path, "kron", "float64"), classes)
    truth = double["ours"]
    return found, {
        "float64": _apart(double["peer"], truth),
        "float32_peer": _apart(single["peer"], truth),
        "float32_ours": _apart(single["ours"], truth),
    }


def _diagonal(path: Path, rounds: int) -> dict[str, Any]:
    """Against ``diagonal_output=True``, both at the same batch size, where they are nearest."""
    with ExitStack() as stack:
        peer, ours = sides(stack, path, "diag", "float32")
        batch = _fastest(peer, "diagonal", (32, 256, 1024))
        return _speed("diag_fast_path", peer, ours, "diagonal", batch, rounds, ours_batch=batch)


def _memory(path: Path) -> dict[str, Any]:
    """Peak of one prediction of ``BATCH`` points, in processes that did nothing like it before.

    The peer's posterior is there already; ours counts the loading of its tables and its session.
    """
    with ExitStack() as stack:
        peer, ours = sides(stack, path, "kron", "float32")
        theirs = peer.call("peak", what="probs", rows=BATCH)
        own = ours.call("peak", what="probs", rows=BATCH)
        versions = peer.call("versions")
    return {
        "peer_versions": versions,
        "ratio_memory_kron_c100": theirs / max(own, 1),
        "memory_kron_c100": {"peer_bytes": theirs, "ours_bytes": own, "batch": BATCH},
    }


def _speed(
    key: str,
    peer: Worker,
    ours: Worker,
    what: str,
    batch: int,
    rounds: int,
    ours_batch: int = BATCH,
) -> dict[str, Any]:
    theirs, own = in_turn(
        (
            lambda: float(peer.call("predict", what=what, rows=batch)),
            lambda: float(ours.call("predict", what=what, rows=ours_batch)),
        ),
        rounds,
    )
    figures = {
        **compared(theirs, own),
        "peer_batch": batch,
        "ours_batch": ours_batch,
        "ours_batch_1_s": float(ours.call("predict", what=what, rows=1)),
    }
    return {f"ratio_{key}": ratio(theirs, own), key: figures}


def _fastest(peer: Worker, what: str, batches: tuple[int, ...]) -> int:
    """The batch size at which the peer needs least time a point."""
    return min(batches, key=lambda n: float(peer.call("predict", what=what, rows=n)))


def _answers(path: Path, peer: Worker, ours: Worker, classes: int) -> dict[str, Array]:
    """Probabilities of the first rows by both sides."""
    rows = 64 if classes <= 10 else 8
    found: dict[str, Array] = {}
    for name, side in (("peer", peer), ("ours", ours)):
        target = path.with_name(f"answer-{name}.npz")
        side.call("answer", what="probs", rows=rows, path=str(target))
        with np.load(target, allow_pickle=False) as data:
            found[name] = data["value"].astype(np.float64)
    return found


def _apart(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max())
