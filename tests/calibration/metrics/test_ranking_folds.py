"""Rankings as folds: the exact one is the exact one, the histogram is within its bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.metrics.ranking import Bounded, aupr, auroc, fpr95, risk_coverage
from calibration.metrics.ranking_folds import exact_ranking, ranking_histogram
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=120)
scores = st.lists(
    st.one_of(st.integers(0, 12).map(lambda i: i / 12), st.floats(-0.5, 1.5)),
    min_size=1,
    max_size=40,
)


def near(got: Bounded, exact: float) -> None:
    assert abs(got.value - exact) <= got.error + 1e-12


@modest
@given(negatives=scores, positives=scores, cells=st.integers(1, 12), cut=st.integers(0, 40))
def test_every_figure_is_within_its_bound(
    negatives: list[float], positives: list[float], cells: int, cut: int
) -> None:
    neg, pos = np.array(negatives), np.array(positives)
    fold = ranking_histogram(0.0, 1.0, cells)
    a = fold.update(fold.init(), {"negatives": neg[:cut], "positives": pos[cut:]})
    b = fold.update(fold.init(), {"negatives": neg[cut:], "positives": pos[:cut]})
    got = fold.merge(a, b)
    whole = run(fold, [{"negatives": neg, "positives": pos}])
    assert got.negatives.tolist() == whole.negatives.tolist()
    near(got.auroc, auroc(neg, pos))
    near(got.aupr, aupr(neg, pos))
    near(got.fpr95, fpr95(neg, pos))
    wrong = np.repeat([0.0, 1.0], [len(neg), len(pos)])
    curve = risk_coverage(-np.concatenate([neg, pos]), wrong)
    near(got.aurc, curve.aurc)
    near(got.augrc, curve.augrc)


@modest
@given(seed=st.integers(0, 10_000), cells=st.integers(1, 9))
def test_cells_of_ties_are_exact(seed: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    neg, pos = ((rng.integers(0, cells, 30) + 0.5) / cells for _ in range(2))
    got = run(ranking_histogram(0.0, 1.0, cells), [{"negatives": neg, "positives": pos}])
    curve = risk_coverage(-np.concatenate([neg, pos]), np.repeat([0, 1], 30))
    assert got.auroc.value == pytest.approx(auroc(neg, pos))
    assert got.aupr.value == pytest.approx(aupr(neg, pos))
    assert got.aurc.value == pytest.approx(curve.aurc)
    assert got.augrc.value == pytest.approx(curve.augrc)


def test_the_bound_is_small_with_many_cells() -> None:
    rng = np.random.default_rng(0)
    neg, pos = rng.normal(0, 1, 40_000), rng.normal(1.5, 1, 9_000)
    got = run(ranking_histogram(-5.0, 6.0), [{"negatives": neg, "positives": pos}])
    for figure in (got.auroc, got.aupr, got.fpr95, got.aurc, got.augrc):
        assert figure.error < 5e-3
    assert got.auroc.error < 1e-3 and got.aurc.error < 1e-3
    near(got.auroc, auroc(neg, pos))


@modest
@given(negatives=scores, positives=scores, cut=st.integers(0, 40))
def test_the_exact_fold_keeps_eight_bytes_a_row(
    negatives: list[float], positives: list[float], cut: int
) -> None:
    neg, pos = np.array(negatives), np.array(positives)
    fold = exact_ranking
    a = fold.update(fold.init(), {"negatives": neg[:cut], "positives": pos[:cut]})
    got = fold.merge(a, run(fold, [{"negatives": neg[cut:], "positives": pos[cut:]}]))
    assert got.n == len(neg) + len(pos) and got.nbytes == 8 * got.n
    assert got.auroc == auroc(neg, pos)
    assert got.aupr == aupr(neg, pos) and got.fpr95 == fpr95(neg, pos)
    want = risk_coverage(-np.concatenate([neg, pos]), np.repeat([0, 1], [len(neg), len(pos)]))
    assert (got.risk_coverage.aurc, got.risk_coverage.augrc) == (want.aurc, want.augrc)


def test_one_side_no_rows_and_infinite_scores() -> None:
    fold = ranking_histogram(0.0, 1.0)
    nothing = run(fold, [])
    one = run(fold, [{"negatives": np.array([0.2, 0.4]), "positives": np.zeros(0)}])
    for totals in (nothing, one):
        for figure in (totals.auroc, totals.aupr, totals.fpr95):
            assert math.isnan(figure.value) and math.isnan(figure.error)
    assert math.isnan(nothing.aurc.value) and math.isnan(nothing.augrc.value)
    assert (one.aurc.value, one.aurc.error, one.augrc.value) == (0, 0, 0)
    with pytest.raises(DataError, match="positives: a ranking needs"):
        _ = run(exact_ranking, [{"negatives": np.ones(2), "positives": np.zeros(0)}]).auroc
    far = run(fold, [{"negatives": np.array([-np.inf]), "positives": np.array([np.inf])}])
    assert far.auroc == Bounded(1.0, 0.0)


def test_bad_input_is_refused() -> None:
    batch = {"negatives": np.zeros(1), "positives": np.array([0.0, np.nan])}
    for fold in (ranking_histogram(0.0, 1.0), exact_ranking):
        with pytest.raises(DataError, match="positives: row 1 is NaN"):
            run(fold, [batch])  # type: ignore[arg-type]
    for low, high in ((0.0, 0.0), (1.0, 0.0), (0.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(DataError, match="finite range"):
            ranking_histogram(low, high)
    with pytest.raises(DataError, match="different cells"):
        ranking_histogram(0, 1).merge(
            ranking_histogram(0, 1).init(), ranking_histogram(0, 2).init()
        )
