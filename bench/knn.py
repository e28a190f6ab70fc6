"""``python -m bench knn``: the k-th nearest neighbour beside pytorch-ood's KNN, one thread each.

A bank of 50,000 rows of 512 features and 10,000 queries (rectified normal numbers: neither side
looks at what they are), k = 50, timed in turn. ``ratio_speed`` is how many times faster our score
of the same bank is, ``difference`` the largest between the two distances. ``graph`` is what the
score costs where it is served, in microseconds a row by size of bank and of batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.peers import Worker, environment, exchange
from bench.timing import compared, in_turn, ratio

BANK, QUERIES, FEATURES, K = 50_000, 10_000, 512, 50
QUICK_QUERIES = 2_000
BANKS, BATCHES = (2_000, 5_000, 10_000, 50_000), (1, 32)
LIMIT = 1e-5


def run(quick: bool) -> dict[str, Any]:
    """Seconds of both sides, their ratio, and how far their answers lie apart."""
    n = QUICK_QUERIES if quick else QUERIES
    rng = np.random.default_rng(0)
    bank, queries = (
        np.maximum(rng.standard_normal((m, FEATURES), np.float32), 0) for m in (BANK, n)
    )
    with (
        exchange() as folder,
        Worker.here("bench.knn_ours") as ours,
        Worker(environment("pytorch-ood"), "bench.ood_peer") as peer,
    ):
        given = str(folder / "rows.npz")
        np.savez(given, bank=bank, queries=queries)
        fits = {
            "peer_s": peer.call("fit", path=given, k=K, threads=1),
            "ours_s": ours.call("fit", path=given, k=K),
        }
        times = in_turn(
            [lambda: peer.call("predict"), lambda: ours.call("predict")], 3 if quick else 5
        )
        scores = []
        for side, name in ((peer, "peer"), (ours, "ours")):
            side.call("answer", path=str(folder / f"{name}.npz"))
            with np.load(folder / f"{name}.npz", allow_pickle=False) as data:
                scores.append(data["scores"])
        graph = {
            m: dict(
                zip(BATCHES, ours.call("graph", rows=m, batches=BATCHES, threads=1), strict=True)
            )
            for m in BANKS
        }
        versions = peer.call("versions")
    return {
        "bank": BANK,
        "queries": n,
        "features": FEATURES,
        "k": K,
        "ratio_speed": ratio(*times),
        "difference": float(np.abs(scores[0] - scores[1]).max()),
        "limit": LIMIT,
        "predict": compared(*times),
        "fit": fits,
        "graph_us": graph,
        "peer": versions,
    }
