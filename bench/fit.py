"""``python -m bench fit``: what a closed-form Laplace fit costs.

Against laplace-torch 0.3 on the same cached features, one thread each, in turn, in its default
backend and a loader of 256 rows. ``_best_batch`` is at the batch size at which it is fastest of
those tried, and ``_backpack`` against its optional backend, which has closed forms for a linear
layer. ``time_over_floor`` is a Kronecker fit of
50,000×512 with 100 classes, every setting at its default, over the time of the sums and
decompositions that it cannot do without.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.laplace import FEATURES, PRIOR_PRECISION, problem
from bench.peers import Worker, environment, exchange
from bench.timing import compared, in_turn, ratio

ROWS = 10_000
FLOOR_ROWS = 50_000
TRIAL_ROWS = 2_048
USUAL = 256
BATCHES = (16, 64, 256, 512)


def run(quick: bool) -> dict[str, Any]:
    """Ratios of seconds, peer over ours; ``time_over_floor`` is ours over the floor."""
    rounds = 3 if quick else 9
    with exchange() as folder:
        path = folder / "rows.npz"
        problem(ROWS, FEATURES, 10).save(path)
        found = _against(path, "diag", "diag_c10", rounds)
        problem(ROWS, FEATURES, 100).save(path)
        found |= _against(path, "kron", "kron_c100", rounds)
        problem(FLOOR_ROWS, FEATURES, 100).save(path)
        return found | _over_floor(path, 2 * rounds + 1)


def _against(path: Path, structure: str, key: str, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        peer = stack.enter_context(Worker(environment("laplace-torch"), "bench.laplace_torch"))
        ours = stack.enter_context(Worker.here("bench.applied"))
        for side in (peer, ours):
            side.call("load", path=str(path), dtype="float32")

        def theirs(backend: str, batch: int, rows: int | None = None) -> float:
            return float(
                peer.call(
                    "fit",
                    structure=structure,
                    prior_precision=PRIOR_PRECISION,
                    rows=rows,
                    batch=batch,
                    backend=backend,
                )
            )

        def own() -> float:
            return _fit(ours, structure, PRIOR_PRECISION)

        batch = min(BATCHES, key=lambda n: theirs("default", n, TRIAL_ROWS))
        other = min(BATCHES, key=lambda n: theirs("backpack", n, TRIAL_ROWS))
        own()
        best, usual, backpack, times = in_turn(
            (
                lambda: theirs("default", batch),
                lambda: theirs("default", USUAL),
                lambda: theirs("backpack", other),
                own,
            ),
            rounds,
        )
        versions = peer.call("versions")
    return {
        "peer_versions": versions,
        f"ratio_{key}": ratio(usual, times),
        f"ratio_{key}_best_batch": ratio(best, times),
        f"ratio_{key}_backpack": ratio(backpack, times),
        key: {**compared(usual, times), "peer_batch": USUAL, "rows": ROWS},
        f"{key}_best_batch": {**best.record(), "peer_batch": batch},
        f"{key}_backpack": {**backpack.record(), "peer_batch": other},
    }


def _over_floor(path: Path, rounds: int) -> dict[str, Any]:
    with Worker.here("bench.applied") as ours:
        ours.call("load", path=str(path), dtype="float32")
        _fit(ours, "kron", None)
        fit, floor = in_turn(
            (lambda: _fit(ours, "kron", None), lambda: float(ours.call("floor"))), rounds
        )
    return {
        "time_over_floor": fit.median / floor.median,
        "floor": {"fit": fit.record(), "floor": floor.record(), "rows": FLOOR_ROWS},
    }


def _fit(ours: Worker, structure: str, prior_precision: float | None) -> float:
    return float(ours.call("fit", structure=structure, prior_precision=prior_precision))
