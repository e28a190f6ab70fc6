"""The evaluation of a classifier: its figures are scikit-learn's and those of slow loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from calibration.evaluation import Evaluation
from calibration.evaluation.parts import Named
from calibration.metrics.coverage import coverage_band
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
        ood_doubts=None,
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


def test_calibration_errors_beyond_ece(evaluation: Evaluation) -> None:
    frozen, hedged = (system(evaluation, n).metrics for n in ("frozen", "hedged"))
    inside = 0
    for name in (
        "smooth_ece",
        "ks_error",
        "equal_mass_ece",
        "top_label_ece",
        "class_ece",
        "brier_reliability",
    ):
        assert frozen[name].range == hedged[name].range == "perfect"
        inside += hedged[name].low <= hedged[name].value <= hedged[name].high
        assert hedged[name].value < 1.2 * hedged[name].high, name
        assert frozen[name].value > 1.2 * frozen[name].high, name
    assert inside >= 5  # each is a range of 95 %
    for m in (frozen, hedged):
        parts = m["brier_reliability"].value - m["brier_resolution"].value
        assert parts + m["brier_uncertainty"].value == pytest.approx(m["brier"].value)
        assert m["ks_error"].value <= m["equal_mass_ece"].value + 0.02


def test_errors_of_the_surest_rows(evaluation: Evaluation) -> None:
    z, y = classes(4000, 6, 0)
    z, y = z[2000:], y[2000:]
    p = softmax(z)
    wrong = (p.argmax(axis=1) != y)[np.argsort(-p.max(axis=1))]
    m = system(evaluation, "hedged").metrics
    assert m["error_at_80"].value == pytest.approx(wrong[:1600].mean())
    assert m["error_at_90"].value == pytest.approx(wrong[:1800].mean())
    best = np.sort(wrong).cumsum() / np.arange(1, 2001)
    assert m["e_aurc"].value == pytest.approx(m["aurc"].value - best.mean())


def test_parts_of_the_rows(evaluation: Evaluation) -> None:
    assert [v.worst_slice is None for v in evaluation.levels] == [False, True, True, True]
    worst = evaluation.levels[0].worst_slice
    assert worst is not None and worst.n >= 80
    assert (worst.band_low, worst.band_high) == coverage_band(2000, worst.n, 0.1)
    for level, sizes in zip(evaluation.levels, evaluation.set_sizes, strict=True):
        strata: dict[int, list[tuple[int, float]]] = {}
        for s, n, c in zip(sizes.size, sizes.count, sizes.coverage, strict=True):
            strata.setdefault((s > 1) + (s > 3), []).append((n, c * n))
        off = [
            abs(sum(k for _, k in v) / sum(n for n, _ in v) - (1 - level.alpha))
            for v in strata.values()
        ]
        found = level.size_violation
        assert found is not None and found.range == "perfect"
        assert found.value == pytest.approx(max(off))
        assert level.groups == ()


def test_named_groups_have_their_coverage_and_their_band() -> None:
    names = np.array(["even", "odd", "<b>"])[np.minimum(np.arange(400) % 5, 2)]
    got = simulated.classification(
        n=400, groups=np.repeat(np.arange(200), 2), named=Named(names, {0.1: {"odd": 8}})
    )
    plain = simulated.classification(n=400)
    first = {g.name: g for g in got.levels[0].groups}
    assert sum(g.n * g.coverage for g in first.values()) / 400 == pytest.approx(
        plain.levels[0].coverage
    )
    assert {k: g.n for k, g in first.items()} == {"even": 80, "odd": 80, "<b>": 240}
    assert [g.coverage for g in got.levels[0].groups] == sorted(g.coverage for g in first.values())
    assert (first["odd"].band_low, first["odd"].band_high) == (1, 1)
    units = len(np.unique(np.repeat(np.arange(200), 2)[names == "<b>"]))
    assert (first["<b>"].band_low, first["<b>"].band_high) == coverage_band(400, units, 0.1)
    assert got.levels[0].size_violation is not None
    assert got.levels[0].size_violation.low is None  # rows of a group are no independent luck
    with pytest.raises(DataError, match="named groups has 3 rows"):
        simulated.classification(n=400, named=Named(np.zeros(3), {}))


def test_probabilities_that_do_not_sum_to_one_are_refused() -> None:
    z, _ = classes(4000, 6, 0)
    p = softmax(z[2000:])
    with pytest.raises(DataError, match="row 7: probabilities sum to"):
        simulated.classification(scaled_probs=np.where(np.arange(2000)[:, None] == 7, p / 2, p))


def test_zeros_and_ones_have_finite_figures() -> None:
    p = np.eye(3)[np.arange(300) % 3]
    fields = {"label": p.argmax(axis=1), "probs": p, "confidence": np.ones(300)}
    y = np.where(np.arange(300) % 10 == 0, (np.arange(300) + 1) % 3, np.arange(300) % 3)
    got = simulated.classification(
        n=300, c=3, y=y, frozen_probs=p, scaled_probs=None, fields=fields,
        sets={0.1: p > 0.5}, ood_in=None, ood_out=None,
    )  # fmt: skip
    m = system(got, "hedged").metrics
    for name in ("ece", "smooth_ece", "ks_error", "equal_mass_ece", "top_label_ece"):
        assert m[name].value == pytest.approx(0.1, abs=1e-6), name
        assert m[name].high == 0
