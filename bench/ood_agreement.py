"""Our scores beside pytorch-ood's on the same features: the same numbers where it is defined alike.

The largest difference, relative to max(1, |score|), of our float64 definitions from its detectors.
Where an estimate differs on purpose its detector is given ours after its own fit, and the order of
its own answers is compared by Spearman's correlation: ``vim`` (the residual's root mean square in
place of its mean, in the factor), ``mds`` and ``rmds`` (a shrunk covariance). Its SHE reads other
features than any of ours, and no flow or learnt score is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import Worker, environment, exchange
from bench.suite import load
from calibration.material import parts_of, split
from posthoc import registry
from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, State
from posthoc.ood import gaussian

SET = "uspsnet"
NAMES = ("msp", "max_logit", "energy", "knn", "vim", "mds", "rmds", "react", "fdbd", "nci")
GIVEN = ("vim", "mds", "rmds")


def agreement() -> dict[str, Any]:
    """Difference and rank correlation of every score that both have, on one set of the suite."""
    known = load(SET, grouped=False)
    parts, test = parts_of(known.material, split(known.material, 0))
    module, linear = parts.module, known.material.linear
    assert linear is not None and known.outside is not None and module.phi is not None
    new = blocks_of.join([test, known.outside])
    names = [n for n in NAMES if n in registry.SCORES]
    states = {n: registry.fit_score(n, linear, blocks_of.of(module)) for n in names}
    ours = {n: registry.page(n).score(states[n], new.phi, new.z) for n in names}
    given = {
        **_rows("", module),
        **_rows("new_", new),
        "weight": linear.weight,
        "bias": linear.bias,
        **_ingredients(module, states),
    }
    with exchange() as folder, Worker(environment("pytorch-ood"), "bench.ood_peer") as peer:
        np.savez(folder / "given.npz", **given)  # type: ignore[arg-type]
        peer.call("scores", given=str(folder / "given.npz"), path=str(folder / "theirs.npz"))
        theirs, versions = _read(folder / "theirs.npz"), peer.call("versions")
    found = {}
    for name in names:
        same = theirs[f"ours/{name}" if name in GIVEN else name]
        away = np.abs(_as_theirs(name, ours[name]) - same) / np.maximum(1.0, np.abs(same))
        found[name] = {
            "difference": float(away.max()),
            "rank_correlation": _rank_correlation(ours[name], theirs[name]),
            "given_ours": name in GIVEN,
        }
    return {"set": SET, "rows": len(new), "scores": found, "peer": versions}


def _as_theirs(name: str, score: F64) -> F64:
    """Our score on the scale of theirs."""
    if name == "knn":
        return np.asarray(np.sqrt(np.maximum(2 + 2 * score, 0.0)))
    if name == "msp":
        return score - 1  # theirs is less the largest probability
    return score / 2 if name == "mds" else score  # theirs is half the squared distance


def _rows(prefix: str, rows: Features) -> dict[str, Array]:
    found = {"phi": np.asarray(rows.phi, np.float64), "z": np.asarray(rows.z, np.float64)}
    if rows.y is not None:
        found["y"] = np.asarray(rows.y, np.int64)
    return {prefix + k: v for k, v in found.items()}


def _ingredients(module: Features, states: dict[str, State]) -> dict[str, Array]:
    """Inverse covariances within classes and around the mean, and what ViM and KNN found."""
    sums = gaussian.add(
        gaussian.empty(module.z.shape[1], np.asarray(module.phi).shape[1]), module, by_class=True
    )
    seen = sums.count > 0
    means = sums.total[seen] / sums.count[seen][:, None]
    between = (means * sums.count[seen][:, None]).T @ means
    mean, n = sums.mean, sums.n
    said = {n: s.settings for n, s in states.items()}
    return {
        "within": gaussian.shrunk_inverse(sums.outer - between, n)[0],
        "common": gaussian.shrunk_inverse(sums.outer - n * np.outer(mean, mean), n)[0],
        "vim_d": np.asarray(said["vim"]["principal"]),
        "vim_alpha": np.asarray(said["vim"]["alpha"]),
        "knn_k": np.asarray(said["knn"]["k"]),
    }


def _rank_correlation(a: Array, b: Array) -> float:
    first, second = (np.argsort(np.argsort(v)).astype(np.float64) for v in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _read(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as data:
        return {k: data[k] for k in data.files}
