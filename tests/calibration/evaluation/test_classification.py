"""The evaluation of a classifier: its figures are scikit-learn's and those of slow loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from calibration.evaluation import Evaluation
from posthoc.contract import DataError
from tests.calibration import simulated
from tests.calibration.simulated import classes, softmax


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return simulated.classification()


def system(e: Evaluation, name: str) -> Any:
    return next(s for s in e.systems if s.name == name)


def test_figures_are_scikit_learns(evaluation: Evaluation) -> None:
    z, y = classes(4000, 6, 0)
    z, y = z[2000:], y[2000:]
    for name, factor in (("frozen", 2.5), ("temperature scaled", 1.1), ("hedged", 1.0)):
        p = softmax(factor * z)
        m = system(evaluation, name).metrics
        wrong = p.argmax(axis=1) != y
        assert m["accuracy"].value == pytest.approx(accuracy_score(y, p.argmax(axis=1)))
        assert m["nll"].value == pytest.approx(log_loss(y, p, labels=range(6)), rel=1e-6)
        assert m["brier"].value == pytest.approx(((p - np.eye(6)[y]) ** 2).sum(axis=1).mean())
        assert m["error_auroc"].value == pytest.approx(roc_auc_score(wrong, -p.max(axis=1)))
        assert m["nll"].low < m["nll"].value < m["nll"].high


def test_the_true_model_is_calibrated_and_the_frozen_one_is_not(evaluation: Evaluation) -> None:
    frozen = system(evaluation, "frozen").metrics["debiased_ece"]
    hedged = system(evaluation, "hedged").metrics["debiased_ece"]
    assert frozen.range == hedged.range == "perfect"
    assert hedged.low <= hedged.value <= hedged.high
    assert frozen.value > 3 * frozen.high
    gain = {(d.metric, d.to): d for d in evaluation.differences}
    assert gain["nll", "frozen"].high < 0
    assert gain["debiased_ece", "frozen"].high < 0
    difference = hedged.value - frozen.value
    assert gain["debiased_ece", "frozen"].value == pytest.approx(difference)
    assert evaluation.label_equal == 1


def test_levels_and_sets(evaluation: Evaluation) -> None:
    assert [v.level for v in evaluation.levels] == ["0.9", "0.95", "0.8", "0.99"]
    for level, sizes in zip(evaluation.levels, evaluation.set_sizes, strict=True):
        assert level.band_low <= level.coverage <= level.band_high
        n = sum(sizes.count)
        assert n == evaluation.n
        mean = sum(s * c for s, c in zip(sizes.size, sizes.count, strict=True)) / n
        assert level.mean_size == pytest.approx(mean)
        covered = sum(c * v for c, v in zip(sizes.count, sizes.coverage, strict=True))
        assert level.coverage == pytest.approx(covered / n)
        empty = dict(zip(sizes.size, sizes.count, strict=True)).get(0, 0)
        assert level.empty_share == pytest.approx(empty / n)


def test_reliability_and_risk_curves_agree_with_the_figures(evaluation: Evaluation) -> None:
    for s in evaluation.systems:
        r, curve = s.reliability, s.risk_coverage
        assert r is not None and curve is not None
        gaps = np.abs(np.array(r.accuracy) - r.confidence) * np.array(r.count)
        assert gaps.sum() / evaluation.n == pytest.approx(s.metrics["ece"].value)
        assert curve.x[-1] == 1
        assert curve.y[-1] == pytest.approx(1 - s.metrics["accuracy"].value)
        assert len(curve.x) <= 200


def test_strange_rows(evaluation: Evaluation) -> None:
    found = {(r.score, r.out): r for r in evaluation.ood}
    assert set(found) == {(s, o) for s in ("hedged", "msp") for o in ("flat", "half")}
    flat = found["hedged", "flat"]
    assert flat.n_out == 1000
    assert flat.auroc.low is not None and flat.auroc.high is not None
    assert flat.auroc.low < flat.auroc.value < flat.auroc.high
    assert flat.auroc.value > found["hedged", "half"].auroc.value
    for h in evaluation.scores:
        for shares in h.shares.values():
            assert sum(shares) == pytest.approx(1)
            assert len(h.edges) == len(shares) + 1


def test_answered_rows_are_those_neither_flagged_nor_abstained_on() -> None:
    z, y = classes(300, 4, 0)
    p = softmax(z)
    label = p.argmax(axis=1)
    rng = np.random.default_rng(0)
    abstain, ood = rng.random(300) < 0.2, rng.random(300) < 0.1
    mask = p > 0.1
    fields = {"label": label, "probs": p, "confidence": p.max(axis=1)}
    rest: dict[str, Any] = {"n": 300, "c": 4, "y": y, "frozen_probs": p, "scaled_probs": None}
    rest |= {"sets": {0.1: mask}, "ood_in": None, "ood_out": None}
    got = simulated.classification(fields=fields | {"abstain": abstain, "ood": ood}, **rest)
    kept = [i for i in range(300) if not abstain[i] and not ood[i]]
    assert got.answered is not None
    assert got.answered.share == pytest.approx(len(kept) / 300)
    assert got.answered.error == pytest.approx(np.mean([label[i] != y[i] for i in kept]))
    assert got.answered.coverage == pytest.approx(np.mean([mask[i, y[i]] for i in kept]))
    assert simulated.classification(fields=fields, **rest).answered is None
    nobody = simulated.classification(fields=fields | {"abstain": np.ones(300, bool)}, **rest)
    assert nobody.answered is not None and nobody.answered.share == 0
    assert [s.name for s in got.systems] == ["frozen", "hedged"]


def test_groups_widen_the_intervals() -> None:
    plain = simulated.classification(n=400)
    grouped = simulated.classification(n=400, groups=np.repeat(np.arange(20), 20))
    a, b = (system(e, "hedged").metrics["nll"] for e in (plain, grouped))
    assert a.value == b.value
    assert (a.low, a.high) != (b.low, b.high)
    assert system(grouped, "hedged").metrics["error_auroc"].low is None


def test_json_and_back(evaluation: Evaluation) -> None:
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_one_row_all_right() -> None:
    p = np.array([[0.9, 0.1]])
    got = simulated.classification(
        n=1,
        c=2,
        y=np.array([0]),
        frozen_probs=p,
        scaled_probs=p,
        fields={"label": np.array([0]), "probs": p, "confidence": p[:, 0]},
        sets={0.1: p > 0.5},
        ood_in=None,
        ood_out=None,
    )
    assert system(got, "hedged").metrics["accuracy"].value == 1
    assert "error_auroc" not in system(got, "hedged").metrics


def test_rows_that_do_not_match_are_named() -> None:
    z, _ = classes(50, 4, 0)
    p = softmax(z)
    with pytest.raises(DataError, match="scaled_probs has 49 rows where there are 2000"):
        simulated.classification(scaled_probs=p[:49])
    with pytest.raises(DataError, match="score x has 3 rows"):
        simulated.classification(ood_in={"x": np.zeros(3)})
    with pytest.raises(DataError, match="label 99"):
        simulated.classification(y=np.full(2000, 99))
