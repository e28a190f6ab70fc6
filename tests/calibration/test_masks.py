"""A mask that misses at most a share of a class, on a segmentation whose truth is known."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from posthoc.contract import FitError

MAPS: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "maps.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("masks")
    onnx.save(MAPS["model"](), found / "segment.onnx")
    scan, mask = MAPS["scans"](400, 0)
    mask[:40][mask[:40] == 1] = 0  # scans without a disc, as labelled
    np.savez(found / "scans.npz", scan=scan, mask=mask)
    return found


def fitted(folder: Path, out: Path, task: Any = "classification", **options: Any) -> Predictor:
    bundle = fit(
        folder / "segment.onnx",
        folder / "scans.npz",
        out / "bundle",
        FitOptions(task=task, ood="none", max_error=None, **options),
        columns=Columns(target="mask"),
        cache_dir=folder / "cache",
        pixels=64,
    )
    return Predictor(bundle)


def test_a_mask_misses_what_it_may(folder: Path, tmp_path: Path) -> None:
    predictor = fitted(folder, tmp_path, mask=1, alphas=(0.1, 0.05))
    promise = predictor.manifest.conformal.guarantees[0]
    assert promise.kind == "missed" and promise.alpha == 0.1
    assert predictor.manifest.conformal.settings["mask"] == 1
    # Images without a disc say nothing of how much of one is missed.
    splits = predictor.manifest.splits
    assert splits.items is not None and 0.8 < promise.n / splits.items["conformal"] < 1
    scan, truth = MAPS["scans"](500, 1)
    for alpha in (0.1, 0.05, 0.2):
        sets = predictor.run({"scan": scan}, outputs=["set"], q_hat=predictor.q_hat(alpha))["set"]
        shown = [(s[1], t == 1) for s, t in zip(sets, truth, strict=True) if (t == 1).any()]
        missed = np.asarray([(~inside[disc]).mean() for inside, disc in shown])
        error = missed.std() * np.sqrt(1 / len(missed) + 1 / promise.n)
        assert missed.mean() <= alpha + 3 * error
        assert missed.mean() >= alpha - 1 / (promise.n + 1) - 3 * error


def test_the_promise_is_about_the_class(folder: Path, tmp_path: Path) -> None:
    """The threshold of all pixels would miss more of a class that is hard to see."""
    every = fitted(folder, tmp_path / "every", mask=None, alphas=(0.1,))
    scan, truth = MAPS["scans"](200, 1)
    sets = every.run({"scan": scan}, outputs=["set"])["set"][:, 1]
    shares = [(~s[t == 1]).mean() for s, t in zip(sets, truth, strict=True) if (t == 1).any()]
    assert np.mean(shares) - 2 * np.std(shares) / np.sqrt(len(shares)) > 0.1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mask": 3}, "the model has classes 0 to 2"),
        ({"mask": 1, "conformal": "raps"}, "--mask is for a segmentation with --conformal lac"),
        ({"mask": 1, "task": "regression"}, "--mask is for a segmentation"),
    ],
)
def test_what_a_mask_cannot_be(
    folder: Path, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(FitError, match=why):
        fitted(folder, tmp_path, **options)
