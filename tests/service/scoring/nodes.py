"""A Ray cluster of several nodes on this machine, one of which is lost in the middle of a fragment:
``python -m … BUNDLE INPUT OUTPUT FRAGMENT NOTE``."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from service.scoring import Progress, ray_engine, score
from tests.service.scoring.moments import Held

_STORE = 100_000_000
_PATIENCE_S = 60
_STARTS = 4


def main(bundle: str, source: str, output: str, name: str, note: Path) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of other clusters of this machine
    cluster = Cluster()
    _add(cluster, num_cpus=0, include_dashboard=False)
    workers = [_add(cluster, num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address
    scorer = ray_engine.Scorer
    ray_engine.Scorer = lambda *a: Held(scorer(*a), name, note)
    lost: list[str] = []

    def lose(progress: Progress) -> None:
        until = time.monotonic() + _PATIENCE_S
        while progress.fragments_done >= 6 and not lost and time.monotonic() < until:
            here = [n for n in workers if note.exists() and n.node_id == note.read_text()]
            if here:
                parts = [p.name for p in Path(output).rglob(".part-*")]
                cluster.remove_node(here[0], allow_graceful=False)
                lost.extend(parts)

    try:
        summary = score(bundle, source, output, engine="ray", workers=2, progress=lose)
        print(json.dumps({"lost": lost, "fragments": summary.fragments}))
    finally:
        cluster.shutdown()


def _add(cluster: Cluster, **settings: Any) -> Any:
    """One more node. Ray gives up after 30 s, which is short on a busy machine."""
    for attempt in range(_STARTS):
        try:
            return cluster.add_node(object_store_memory=_STORE, **settings)
        except Exception:  # Ray raises a bare one
            if attempt == _STARTS - 1:
                raise
    raise AssertionError


if __name__ == "__main__":
    main(*sys.argv[1:5], Path(sys.argv[5]))
