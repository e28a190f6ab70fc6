"""R-AUROC and recall@1 against a slow loop, scikit-learn and what must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from bench.material import mnist_net
from calibration.metrics.r_auroc import nearest, recall_at_1, retrieval
from posthoc.contract import DataError
from posthoc.links import softmax


def embedded(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    spread = rng.gamma(2, 0.6, n)
    return (
        spread + rng.normal(0, 0.3, n),
        np.eye(4, 6)[y] + spread[:, None] * rng.normal(0, 0.4, (n, 6)),
        y,
    )


def slow(u: list[float], e: list[list[float]], y: list[int]) -> tuple[list[bool], float]:
    """Whether each row is right, and P(wrong above right) with halves for ties."""
    right = []
    for i, a in enumerate(e):
        best, place = -2.0, -1
        for j, b in enumerate(e):
            if j == i:
                continue
            dot = sum(p * q for p, q in zip(a, b, strict=True))
            cosine = dot / math.hypot(*a) / math.hypot(*b)
            if cosine > best + 1e-9:
                best, place = cosine, j
        right.append(y[place] == y[i])
    pairs = [
        (p > q) + (p == q) / 2
        for p, w in zip(u, right, strict=True)
        for q, r in zip(u, right, strict=True)
        if not w and r
    ]
    return right, sum(pairs) / len(pairs) if pairs else math.nan


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(-2, 2), min_size=2, max_size=2).filter(any),
            st.integers(0, 2),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_it_is_its_definition_with_ties_of_both_kinds(
    rows: list[tuple[int, list[int], int]],
) -> None:
    u, e, y = ([r[i] for r in rows] for i in range(3))
    right, want = slow(u, e, y)  # type: ignore[arg-type]
    assert recall_at_1(np.array(e), np.array(y)) == pytest.approx(np.mean(right))
    if math.isnan(want):
        with pytest.raises(DataError, match="rows of both kinds"):
            retrieval(np.array(u), np.array(e), np.array(y))
    else:
        assert retrieval(np.array(u), np.array(e), np.array(y)).r_auroc == pytest.approx(want)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("held", [1, 1000, 1 << 23])
def test_it_agrees_with_scikit_learn_in_blocks_of_any_size(
    seed: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.metrics.r_auroc._HELD", held)
    u, e, y = embedded(seed=seed)
    search = NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute").fit(e)
    index = search.kneighbors(return_distance=False)[:, 0]
    np.testing.assert_array_equal(nearest(e), index)
    right = y[index] == y
    got = retrieval(u, e, y)
    assert got.recall_at_1 == pytest.approx(right.mean(), abs=1e-12)
    assert got.r_auroc == pytest.approx(roc_auc_score(right, -u), abs=1e-12)
    assert got.r_auroc > 0.55  # the rows far from their class are the uncertain ones


def test_copies_are_near_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    once = rng.normal(size=(40, 33))
    e = np.concatenate([once, once * rng.gamma(2, 1, (40, 1)), once])
    want = np.concatenate([np.arange(40, 80), np.arange(40), np.arange(40)])
    for held in (1, 500, 1 << 23):
        monkeypatch.setattr("calibration.metrics.r_auroc._HELD", held)
        np.testing.assert_array_equal(nearest(e), want)


def test_scale_type_and_order_do_not_matter() -> None:
    u, e, y = embedded()
    want = retrieval(u, e, y)
    scale = 10.0 ** np.random.default_rng(1).integers(-200, 200, len(e))
    assert retrieval(u, e * scale[:, None], y) == want
    order = np.random.default_rng(2).permutation(len(e))
    moved = retrieval(u[order], e[order], np.array(list("abcd"))[y[order]])
    assert moved.r_auroc == pytest.approx(want.r_auroc, abs=1e-12)
    assert moved.recall_at_1 == want.recall_at_1
    for dtype in (np.float16, np.float32):
        assert retrieval(u, e.astype(dtype), y).r_auroc == pytest.approx(want.r_auroc, abs=0.02)
    assert retrieval(-u, e, y).r_auroc == pytest.approx(1 - want.r_auroc, abs=1e-12)


def test_what_cannot_be_ranked_is_named() -> None:
    u, e, y = embedded(9)
    for few in (e[:0], e[:1], e[0]):
        with pytest.raises(DataError, match=r"two rows N×D|labels have shape"):
            recall_at_1(few, y[: len(few)])
    with pytest.raises(DataError, match="labels have shape"):
        recall_at_1(e, y[:8])
    with pytest.raises(DataError, match="labels: row 2 is NaN"):
        recall_at_1(e, np.where(np.arange(9) == 2, np.nan, y))
    with pytest.raises(DataError, match="uncertainty has shape"):
        retrieval(u[:8], e, y)
    with pytest.raises(DataError, match="uncertainty: row 4 is NaN"):
        retrieval(np.where(np.arange(9) == 4, np.nan, u), e, y)
    for bad, what in ((np.nan, "not finite"), (np.inf, "not finite"), (0.0, "length 0")):
        broken = e.copy()
        broken[3] = bad
        with pytest.raises(DataError, match=f"embeddings: row 3 .*{what}"):
            nearest(broken)
    with pytest.raises(DataError, match="of 9 of 9 rows"):
        retrieval(u, e, np.zeros(9))
    with pytest.raises(DataError, match="of 0 of 9 rows"):
        retrieval(u, e, np.arange(9))


def test_doubt_of_a_digit_reader_tells_wrong_neighbours() -> None:
    """Every label was seen here, so that this is far easier than the benchmark of the paper."""
    material = mnist_net().material
    rows = material.features(material.usable[:3000])
    assert rows.phi is not None and rows.y is not None
    got = retrieval(1 - softmax(rows.z).max(1), rows.phi, rows.y)
    assert got.recall_at_1 > 0.97
    assert got.r_auroc > 0.85
