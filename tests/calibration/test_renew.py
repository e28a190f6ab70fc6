"""Bundles made anew on fresh labels: coverage comes back, and nothing worse is ever written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.bundle import (
    load_bundle,
)
from calibration.conformal.intervals import INTERVALS
from calibration.fit_thresholds import run_head
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from calibration.renew.renewal import summary
from calibration.renew.rows import Labelled, divided
from calibration.renew.thresholds import scores_of
from calibration.renew.write import write_renewed
from hedged.commands.describe import describe
from posthoc.contract import DataError, Features, Task
from posthoc.logits import to_logits
from posthoc.model.probe import with_outputs
from posthoc.runtime import open_session
from service.models import load_model
from tests.calibration.renewals import (
    AS_FITTED,
    SHIFTED,
    TASKS,
    bundles,
    covered,
    in_band,
    moved,
    renewed,
    truth,
)
from tests.factory import rows, tiny_bundle

__all__ = ["bundles"]

# Coverage comes back


@pytest.mark.parametrize("task", TASKS)
def test_coverage_comes_back(bundles: dict[Task, Path], tmp_path: Path, task: Task) -> None:
    old = load_bundle(bundles[task])
    assert not in_band(old, covered(old.path, task, SHIFTED[task]))
    found = renewed(old.path, moved(old.path, task, SHIFTED[task]))
    assert found.comparison.publish
    assert [v.inside for v in found.comparison.before.levels] == [False, False]
    assert [v.inside for v in found.comparison.after.levels] == [True, True]
    new = write_renewed(found, tmp_path / "new", "2")
    assert in_band(new, covered(new.path, task, SHIFTED[task]))
    # The temperature, or the standard deviation, is that of the rows: twice, or two and a half.
    ratio = new.manifest.scaling["temperature"] / old.manifest.scaling["temperature"]
    assert ratio == pytest.approx(SHIFTED[task] / AS_FITTED[task], rel=0.2)
    Predictor(new).self_check()
    assert load_model(new.path, device="cpu", threads=0).version == "2"
    describe(new)


@pytest.mark.parametrize("task", TASKS)
def test_the_frozen_answer_stays(bundles: dict[Task, Path], tmp_path: Path, task: Task) -> None:
    found = renewed(bundles[task], moved(bundles[task], task, SHIFTED[task]))
    new = write_renewed(found, tmp_path / "new", "2").path
    x, _ = rows(task, 3000, 90)
    frozen = [s.name for s in Predictor(new).manifest.frozen_outputs]
    names = ["label" if task == "classification" else "mean", "ood_score", "ood", *frozen]
    before, after = (Predictor(b).run({"x": x}, outputs=names) for b in (bundles[task], new))
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("seed", range(5))
def test_rows_like_those_of_the_fit_change_nothing(bundles: dict[Task, Path], seed: int) -> None:
    for task in TASKS:
        fresh = moved(bundles[task], task, AS_FITTED[task], seed=200 + seed)
        found = renewed(bundles[task], fresh)
        assert found.factor is not None
        assert found.factor.found == pytest.approx(1.0, abs=0.15)
        assert not found.comparison.worse or not found.comparison.publish
        if not found.factor.taken:
            assert found.comparison.difference.value == 0.0
            assert found.made.head.temperature == found.opened.head.temperature


def test_the_promise_holds_over_divisions(bundles: dict[Task, Path]) -> None:
    """Over 20 divisions of one sample the measured rows lie inside their band."""
    task: Task = "classification"
    fresh = moved(bundles[task], task, SHIFTED[task], n=6000)
    inside = 0
    for seed in range(20):
        found = renewed(bundles[task], fresh, seed=seed)
        inside += found.comparison.after.levels[0].inside
    assert inside >= 18


KINDS: list[dict[str, Any]] = [
    {"conformal": "aps"},
    {"conformal": "raps"},
    {"conformal": "raps", "randomised": True},
    {"conformal": "saps", "randomised": True},
    {"conformal": "topk"},
    {"conformal": "topk", "randomised": True},
]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("only", [None, "conformal"])
def test_every_score_of_sets(tmp_path: Path, options: dict[str, Any], only: Any) -> None:
    bundle = tiny_bundle(tmp_path / "b", **options)
    found = renewed(bundle, moved(bundle, "classification", 5.0), only=only)
    new = write_renewed(found, tmp_path / "new", "2")
    share = covered(new.path, "classification", 5.0)
    first = new.manifest.conformal.guarantees[0]
    low, high = coverage_band(first.n, 4000, first.alpha)
    # Ranks tie; without u so do the scores of the last class of the three.
    tied = not options.get("randomised")
    assert low <= share and (tied or share <= high)
    assert found.comparison.after.levels[0].inside
    assert new.manifest.conformal.randomised == bool(options.get("randomised"))


@pytest.mark.parametrize("method", INTERVALS)
@pytest.mark.parametrize("side", ["two", "lower", "upper"])
def test_every_interval(tmp_path: Path, method: str, side: Any) -> None:
    bundle = tiny_bundle(tmp_path / "b", "regression", conformal=method, side=side)
    found = renewed(bundle, moved(bundle, "regression", 0.6))
    new = write_renewed(found, tmp_path / "new", "2")
    assert in_band(new, covered(new.path, "regression", 0.6))
    only = renewed(bundle, moved(bundle, "regression", 0.6), only="conformal")
    again = write_renewed(only, tmp_path / "only", "2")
    assert in_band(again, covered(again.path, "regression", 0.6))
    assert again.manifest.scaling == load_bundle(bundle).manifest.scaling


@pytest.mark.parametrize("kind", ["emp", "linear", "kde"])
@pytest.mark.parametrize("method", ["laplace", "student_t", "none"])
def test_quantiles_are_exceeded_as_often_as_they_say(
    tmp_path: Path, kind: Any, method: str
) -> None:
    own = {"prediction": "module", "predictive": "probit"} if method == "student_t" else {}
    bundle = tiny_bundle(tmp_path / "b", "regression", recalibration=kind, method=method, **own)
    new = write_renewed(renewed(bundle, moved(bundle, "regression", 0.6)), tmp_path / "new", "2")
    x, _ = rows("regression", 4000, 71)
    y = truth("regression", x, 0.6, 72)
    made = Predictor(new).run({"x": x})["quantiles"]
    n = new.manifest.conformal.guarantees[0].n
    for i, level in enumerate(new.manifest.quantile_levels):
        below = (y <= made[:, :, i]).mean()
        assert abs(below - level) < 4 * np.sqrt(level * (1 - level) * (1 / n + 1 / len(y)))


# Scores are the graph's own


@pytest.mark.parametrize("options", [{}, *KINDS])
def test_served_sets_are_had_back_from_served_probabilities(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    bundle = tiny_bundle(tmp_path / "b", **options)
    predictor = Predictor(bundle)
    x, _ = rows("classification", 2000, 5)
    u = np.random.default_rng(0).random(2000).astype(np.float32)
    out = predictor.run({"x": x, "u": u} if options.get("randomised") else {"x": x})
    head = renewed(bundle, moved(bundle, "classification", 5.0)).opened.head
    y = np.zeros(2000, np.int64)
    fresh = Labelled(y, y, y, label=out["label"], probs=out["probs"], confidence=out["confidence"])
    got = np.concatenate([s for _, s in scores_of(head, fresh, u)]) <= np.float32(head.q_hat)
    np.testing.assert_array_equal(got, out["set"])


def test_thresholds_are_ranks_by_definition(bundles: dict[Task, Path]) -> None:
    fresh = moved(bundles["classification"], "classification", 5.0)
    found = renewed(bundles["classification"], fresh)
    assert found.factor is not None
    rows = divided(fresh, {"scaling": 0.25, "conformal": 0.4, "measured": 0.35}, 0)["conformal"]
    assert rows.probs is not None
    scores = []
    for p, y in zip(rows.probs.astype(float), rows.y, strict=True):
        powered = p ** (1 / found.factor.value)
        scores.append(1 - powered[y] / powered.sum())
    for g in found.made.conformal.guarantees:
        k = math.ceil(round((len(rows) + 1) * (1 - g.alpha), 9))
        assert (g.n, g.rank) == (len(rows), k)
        assert g.threshold == pytest.approx(sorted(scores)[k - 1], rel=1e-5)
        assert g.threshold > sorted(scores)[k - 1]  # outward, never inward


@pytest.mark.parametrize("options", [{}, *KINDS[:2]])
def test_no_row_scores_more_in_the_graph_than_in_its_rank(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Equal rows at the threshold would all fall out of it otherwise."""
    bundle = tiny_bundle(tmp_path / "b", **options)
    fresh = moved(bundle, "classification", 5.0)
    found = renewed(bundle, fresh)
    opened, head = found.opened, found.made.head
    x, _ = rows("classification", 4000, 50)
    names = [opened.z] if opened.phi is None else [opened.z, opened.phi]
    model = with_outputs(onnx.load_from_string(opened.frozen), names)
    z, *phi = open_session(model).run(names, {"x": x})
    features = Features(phi[0] if phi else None, to_logits(z, opened.link))
    own = run_head(head, features)["set_scores"][np.arange(4000), fresh.y]
    conformal = np.isin(fresh.keys, found.conformal.keys)
    actual, ranked = np.sort(own[conformal]), found.made.scores["set"]
    assert (ranked >= actual).all()
    np.testing.assert_allclose(ranked, actual, rtol=1e-5, atol=1e-7)
    y = fresh.y[conformal]
    bare = np.concatenate([s for _, s in scores_of(head, found.conformal, y)])
    assert (np.sort(bare[np.arange(len(y)), y]) < actual).any()  # rounding alone does this


def test_parts_do_one_thing_each(bundles: dict[Task, Path]) -> None:
    """Labels of measured rows move no threshold, those of conformal rows no factor."""
    bundle = bundles["classification"]
    fresh = moved(bundle, "classification", 5.0)
    shares = {"scaling": 0.25, "conformal": 0.4, "measured": 0.35}
    parts = divided(fresh, shares, 3)
    every = np.concatenate([p.keys for p in parts.values()])
    assert len(np.unique(every)) == len(every) == len(fresh)
    first = renewed(bundle, fresh, seed=3)
    rng = np.random.default_rng(0)
    for part in ("measured", "conformal"):
        y = fresh.y.copy()
        inside = np.isin(fresh.keys, parts[part].keys)
        y[inside] = rng.integers(0, 3, int(inside.sum()))
        other = renewed(bundle, dataclasses.replace(fresh, y=y), seed=3)
        assert other.factor == first.factor
        same = other.made.conformal == first.made.conformal
        assert same == (part == "measured")
        assert (other.made.abstain == first.made.abstain) or part == "conformal"


# Thresholds of their own, and weights


def test_classes_have_new_thresholds_of_their_own(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", given="class", alphas=(0.1, 0.2))
    found = renewed(bundle, moved(bundle, "classification", 5.0, n=6000))
    new = write_renewed(found, tmp_path / "new", "2")
    x, _ = rows("classification", 6000, 91)
    y = truth("classification", x, 5.0, 92)
    made = Predictor(new).run({"x": x})["set"]
    for c, cell in enumerate(new.manifest.conformal.guarantees[0].cells):
        own = y == c
        low, high = coverage_band(cell.n, int(own.sum()), 0.1)
        assert low <= made[own, c].mean() <= high, cell.name
    assert all(v.inside for v in found.comparison.after.levels)
    assert any(v.outside for v in found.comparison.before.levels)
    assert len(json.dumps(summary(found), allow_nan=False)) > 0


def test_a_class_that_would_lose_its_threshold_is_an_error(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", given="class", alphas=(0.1,))
    fresh = moved(bundle, "classification", 5.0)
    few = np.flatnonzero(fresh.y == 2)[8:]
    keep = np.setdiff1d(np.arange(len(fresh)), few)
    with pytest.raises(DataError, match=r"1 of 3 class thresholds at 0\.9 would be lost \(2 has"):
        renewed(bundle, fresh.take(keep))


def test_only_conformal_keeps_the_scaling(bundles: dict[Task, Path], tmp_path: Path) -> None:
    bundle = bundles["classification"]
    fresh = moved(bundle, "classification", 5.0)
    found = renewed(bundle, fresh, only="conformal")
    assert set(found.parts) == {"conformal", "measured"} and found.factor is None
    new = write_renewed(found, tmp_path / "new", "2")
    x, _ = rows("classification", 500, 3)
    before, after = (Predictor(b).run({"x": x}, outputs=["probs"]) for b in (bundle, new.path))
    np.testing.assert_array_equal(before["probs"], after["probs"])
    assert in_band(new, covered(new.path, "classification", 5.0))
    assert found.comparison.difference.value == 0.0 and found.comparison.publish
    assert new.manifest.renewal is not None and new.manifest.renewal.factor == 1.0


# Abstention


def test_abstention_holds_its_promise_again(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", max_error=0.3)
    x, _ = rows("classification", 20_000, 14)

    def error(path: Path) -> tuple[float, float]:
        y = truth("classification", x, 3.0, 15)
        out = Predictor(path).run({"x": x}, outputs=["abstain", "label"])
        kept = ~out["abstain"]
        return float((out["label"] != y)[kept].mean()), float(kept.mean())

    assert error(bundle)[0] > 0.3
    for only in (None, "conformal"):
        found = renewed(bundle, moved(bundle, "classification", 3.0), only=only)  # type: ignore[arg-type]
        new = write_renewed(found, tmp_path / f"new-{only}", "2")
        wrong, answered = error(new.path)
        assert wrong <= 0.3 and answered > 0.02
        record = new.manifest.abstain
        assert record is not None and record.n == found.parts["conformal"]
        assert record.answered == pytest.approx(answered, abs=0.05)


def test_a_regression_abstains_as_before_unless_it_is_told_what_is_wrong(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", "regression", tolerance=0.6, max_error=0.1)
    fresh = moved(bundle, "regression", 0.4)
    kept = write_renewed(renewed(bundle, fresh), tmp_path / "kept", "2")
    x, _ = rows("regression", 3000, 5)
    before, after = (Predictor(b).run({"x": x})["abstain"] for b in (bundle, kept.path))
    assert (before != after).mean() < 0.002
    said = "abstention answers the rows that it did"
    assert any(said in n for n in kept.manifest.notes)
    found = renewed(bundle, fresh, tolerance=0.6)
    assert "abstention" in found.renewed and not any(said in n for n in found.notes)
    assert found.made.abstain is not None
    assert found.made.abstain.n == found.parts["conformal"]
    assert not any(k.startswith("abstention") for k in found.kept)


@pytest.mark.parametrize("family", ["beta", "isotonic"])
def test_a_confidence_of_its_own_is_fitted_again(tmp_path: Path, family: Any) -> None:
    bundle = tiny_bundle(tmp_path / "b", confidence=family)
    found = renewed(bundle, moved(bundle, "classification", 5.0))
    new = write_renewed(found, tmp_path / "new", "2")
    x, _ = rows("classification", 6000, 33)
    y = truth("classification", x, 5.0, 34)
    for path, off in ((bundle, True), (new.path, False)):
        out = Predictor(path).run({"x": x}, outputs=["confidence", "label"])
        gap = abs(float(out["confidence"].mean()) - float((out["label"] == y).mean()))
        assert (gap > 0.1) == off
    assert f"confidence: {family}" in found.renewed
