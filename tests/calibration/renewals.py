"""Labelled rows as a ledger would have them: what a bundle serves, and a truth that moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.bundle import Bundle, load_bundle
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from calibration.renew.renewal import Renewal, renew
from calibration.renew.rows import Labelled, Window, id_keys
from posthoc.contract import Task
from tests.factory import rows, weights

WINDOW = Window(1_700_000_000.0, 1_700_600_000.0, 8000, 4000)
SHIFTED: dict[Task, float] = {"classification": 5.0, "regression": 0.6}
AS_FITTED: dict[Task, float] = {"classification": 2.0, "regression": 0.3}
TASKS: tuple[Task, ...] = ("classification", "regression")


def truth(task: Task, x: np.ndarray, spread: float, seed: int) -> np.ndarray:
    """Classes drawn from the factory's network at a temperature, N, or its means plus noise of a
    standard deviation, N×1. Its bundles were fitted at 2 and 0.3."""
    t = weights(task)
    z = np.tanh(x @ t["w1"] + t["b1"]) @ t["w2"] + t["b2"]
    rng = np.random.default_rng(seed)
    if task == "classification":
        return np.asarray((z / spread + rng.gumbel(size=z.shape)).argmax(1))
    return np.asarray(z + rng.normal(size=z.shape) * spread)


def served(bundle: Path, x: np.ndarray, y: np.ndarray, group: np.ndarray | None = None) -> Labelled:
    """What a bundle says of x, beside y."""
    predictor = Predictor(bundle)
    feed = {"x": x}
    if group is not None:
        feed["group"] = group
    out = predictor.run(feed)
    keys = id_keys([f"row-{i}" for i in range(len(x))])
    times = WINDOW.since + np.arange(len(x))
    codes = np.full(len(x), -1) if group is None else group
    if "probs" in out:
        sure = out["confidence"].astype(np.float64)
        return Labelled(
            keys, y, codes, label=out["label"], probs=out["probs"], confidence=sure, time=times
        )
    return Labelled(keys, y, codes, mean=out["mean"], std=out["std"], time=times)


def moved(bundle: Path, task: Task, spread: float, n: int = 4000, seed: int = 50) -> Labelled:
    """n fresh rows of the factory whose truth has another spread."""
    x, _ = rows(task, n, seed)
    return served(bundle, x, truth(task, x, spread, seed + 1000))


def covered(bundle: Path, task: Task, spread: float, n: int = 4000, seed: int = 70) -> float:
    """The share of n rows that a bundle covers at its first level; u is uniform where it is one."""
    x, _ = rows(task, n, seed)
    y, predictor = truth(task, x, spread, seed + 1000), Predictor(bundle)
    feed = {"x": x}
    if any(s.name == "u" for s in predictor.optional):
        feed["u"] = np.random.default_rng(seed).random(n).astype(np.float32)
    out = predictor.run(feed)
    if task == "classification":
        return float(out["set"][np.arange(n), y].mean())
    return float(((out["lower"] <= y) & (y <= out["upper"])).all(1).mean())


@pytest.fixture(scope="module")
def bundles(classification_bundle: Path, regression_bundle: Path) -> dict[Task, Path]:
    return {"classification": classification_bundle, "regression": regression_bundle}


def renewed(bundle: Path, rows: Labelled, **how: Any) -> Renewal:
    return renew(load_bundle(bundle), rows, WINDOW, **how)


def in_band(bundle: Bundle, share: float, n: int = 4000) -> bool:
    first = bundle.manifest.conformal.guarantees[0]
    low, high = coverage_band(first.n, n, first.alpha)
    return low <= share <= high
