"""Realised coverage with few conformal rows, beside other libraries on the same splits.

The pool is the conformal and test rows of split 0 of two sets of the developer suite, logits after
the temperature of its calibration rows: newsgroups, whose model is right less often than the levels
ask, and letter, whose model is right more often than .9. Each of many splits draws rows without
replacement, so that coverage is ``ceil((n+1)(1-alpha))/(n+1)`` in the mean where the rank is right
and scores are untied (`expected`), and at least this where sets are never empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.conformal_peer import K_REG, PENALTY, Sets, Side
from bench.peers import Worker, environment, exchange
from bench.processes import each
from bench.suite import load
from calibration.bundle import conformal_rank, threshold_at
from calibration.conformal.scores import class_scores
from calibration.material import parts_of, split
from calibration.scaling import fit_temperature
from posthoc.contract import Array
from posthoc.links import softmax

POOLS = ("newsgroups", "letter")
SIZES = (20, 50, 100, 1000)
ALPHAS = (0.1, 0.05)
SCORES = ("lac", "aps", "raps")
TEST = 500
SPLITS, QUICK_SPLITS = 500, 50
PEERS = {
    "torch-uncertainty": "bench.conformal_uncertainty",
    "mapie": "bench.conformal_mapie",
    "torchcp": "bench.conformal_torchcp",
}
LEFT_OUT = {("mapie", "raps")}  # `bench.conformal_mapie` says why
_SETTINGS = {"raps": {"k_reg": K_REG, "penalty": PENALTY}}


def beside_peers(quick: bool) -> dict[str, Any]:
    """``table``, a row for each pool, score, n, level and library, and ``versions``."""
    splits = QUICK_SPLITS if quick else SPLITS
    pools = POOLS[-1:] if quick else POOLS
    for name in PEERS:
        environment(name)  # made on first use, which two processes need not do at once
    found = sorted(each(pool_rows, [(pool, splits) for pool in pools]), key=lambda f: f[0])
    table = [row for _, rows, _ in found for row in rows]
    return {"splits": splits, "test_rows": TEST, "table": table, "versions": found[0][2]}


def pool_rows(pool: str, splits: int) -> tuple[int, list[dict[str, Any]], dict[str, str]]:
    """(place of the pool, its rows of the table, versions of the libraries)."""
    versions: dict[str, str] = {}
    with exchange() as folder:
        path = folder / "pool.npz"
        write_pool(pool, path, splits)
        mine = Side(ours(0))
        mine.load(str(path))
        table = _rows(pool, "hedged", mine.run, folder)
        for name, module in PEERS.items():
            with Worker(environment(name), module) as peer:
                peer.call("load", path=str(path))
                versions |= peer.call("versions")
                table += _rows(pool, name, partial(peer.call, "run"), folder)
    return POOLS.index(pool), table, versions


def ours(seed: int) -> Sets:
    """Ours; APS and RAPS randomised."""
    rng = np.random.default_rng(seed)

    def sets(score: str, z: Array, y: Array, new: Array, alphas: Sequence[float]) -> list[Array]:
        settings = _SETTINGS.get(score, {})
        u = [rng.uniform(size=len(v)) if score != "lac" else 1.0 for v in (z, new)]
        known = class_scores(score, settings, softmax(z), u[0])[np.arange(len(z)), y]
        fresh = class_scores(score, settings, softmax(new), u[1])
        return [fresh <= threshold_at(np.sort(known), a) for a in alphas]

    return sets


def write_pool(name: str, path: Path, splits: int) -> None:
    """Scaled logits ``z``, labels ``y`` and ``rows`` of every split."""
    material = load(name, grouped=False).material
    parts, test = parts_of(material, split(material, 0))
    assert parts.calibration.y is not None and parts.conformal.y is not None and test.y is not None
    t, _ = fit_temperature(parts.calibration.z, parts.calibration.y)
    z = np.concatenate([parts.conformal.z, test.z]).astype(np.float32) / np.float32(t)
    y = np.concatenate([parts.conformal.y, test.y]).astype(np.int64)
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(len(y))[: max(SIZES) + TEST] for _ in range(splits)])
    np.savez(path, z=z, y=y, rows=rows)


def _rows(pool: str, name: str, run: Callable[..., None], folder: Path) -> list[dict[str, Any]]:
    made = []
    for score in SCORES:
        if (name, score) in LEFT_OUT:
            continue
        for n in SIZES:
            path = folder / "found.npz"
            run(path=str(path), score=score, n=n, test=TEST, alphas=list(ALPHAS))
            with np.load(path) as data:
                found = data["value"]
            for j, alpha in enumerate(ALPHAS):
                coverage = found[:, j, 0]
                made.append(
                    {
                        "pool": pool,
                        "score": score,
                        "n": n,
                        "alpha": alpha,
                        "library": name,
                        "coverage": float(coverage.mean()),
                        "error": float(coverage.std(ddof=1) / np.sqrt(len(coverage))),
                        "expected": conformal_rank(n, alpha) / (n + 1),
                        "size": float(found[:, j, 1].mean()),
                    }
                )
    return made
