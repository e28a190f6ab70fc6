"""Kinds of shift, against loops over rows and rows whose shift is known."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from calibration.drift import shift_kind
from calibration.drift.shift_kind import (
    ASSUMES,
    KINDS,
    MOST_CLASSES,
    Shift,
    cells,
    compare,
    from_json,
    merge,
    start,
    to_json,
    update,
)
from calibration.shift.class_shift import em
from posthoc.contract import DataError

C = 4
CENTRES = 2.5 * np.eye(C)


class Rows:
    """Points around a centre a class, p(y|x) known exactly; strangeness is the distance to the
    nearest centre, its p-value a rank among points of an even mix."""

    def __init__(self, x: np.ndarray, share: np.ndarray) -> None:
        squared = ((x[:, None] - CENTRES) ** 2).sum(-1)
        z = np.log(share) - squared / 2
        p = np.exp(z - z.max(axis=1, keepdims=True))
        self.probs = p / p.sum(axis=1, keepdims=True)
        self.score = squared.min(axis=1)


def points(rng: np.random.Generator, n: int, share: np.ndarray | None = None) -> np.ndarray:
    y = rng.choice(C, n, p=share)
    return CENTRES[y] + rng.normal(size=(n, C))


RANKED = np.sort(Rows(points(np.random.default_rng(99), 5000), np.full(C, 1 / C)).score)


def seen(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cells, probabilities) of a frozen model that was made for an even mix."""
    rows = Rows(x, np.full(C, 1 / C))
    pvalue = (1 + len(RANKED) - np.searchsorted(RANKED, rows.score)) / (len(RANKED) + 1)
    return cells(rows.probs.argmax(1), rows.probs.max(1), pvalue), rows.probs


def told(seed: int, window: np.ndarray, n: int = 2000) -> Shift:
    reference = update(start(C), *seen(points(np.random.default_rng((seed, 1)), n)))
    return compare(reference, seen(window)[0])


def test_a_healthy_window_is_seldom_said_to_have_shifted() -> None:
    said = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference = update(start(C), *seen(points(rng, 1000)))
        windows = np.split(seen(points(rng, 5000))[0], 10)
        said += sum(compare(reference, window).kind != "none" for window in windows)
    assert said <= 10  # 5 % of 200; each of three tests has a level of 1 %, two are conservative


@pytest.mark.parametrize("seed", range(5))
def test_other_shares_of_the_classes_are_a_class_mix_and_explain_everything(seed: int) -> None:
    share = np.array([0.7, 0.1, 0.1, 0.1])
    found = told(seed, points(np.random.default_rng(seed), 1000, share))
    assert found.kind == "class_mix"
    assert found.classes < 1e-6
    assert found.strange < 0.1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_points_from_elsewhere_are_some_rows_and_their_share_is_found(
    seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    new = round(1000 * share)
    elsewhere = np.array([5.0, 5.0, 0.0, 0.0]) + 0.5 * rng.normal(size=(new, C))
    found = told(seed, np.concatenate([points(rng, 1000 - new), elsewhere]))
    assert found.kind == "some_rows"
    assert found.low <= share <= found.high
    assert found.strange == pytest.approx(share, abs=0.06)
    assert found.lean + 1.64 * found.lean_sd < found.lean_if_all
    # Each falls to the first or second class; of an even reference that is half the mass away.
    assert found.crowding == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("seed", range(5))
def test_noise_on_every_row_is_all_rows_and_crowds_nowhere(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = told(seed, points(rng, 3000) + 0.8 * rng.normal(size=(3000, C)), 3000)
    assert found.kind == "all_rows"
    assert found.lean > 3 * found.lean_sd
    assert found.crowding < 0.1


def test_between_some_and_all_rows_the_lean_decides_and_doubt_is_said() -> None:
    """The same noise on every row, seen by few rows and by many."""
    kinds: dict[int, list[str]] = {600: [], 4000: []}
    for n, seed in itertools.product(kinds, range(15)):
        rng = np.random.default_rng(seed)
        found = told(seed, points(rng, n) + 0.6 * rng.normal(size=(n, C)), n)
        kinds[n].append(found.kind)
        sd, lean = found.lean_sd, found.lean
        if lean > 3 * sd:
            assert found.kind == "all_rows"
        elif lean < 1.64 * sd and lean + 1.64 * sd < found.lean_if_all:
            assert found.kind == "some_rows"
        else:
            assert found.kind == "cannot_tell"
    assert kinds[4000].count("all_rows") >= 14
    assert set(kinds[600]) == {"all_rows", "some_rows", "cannot_tell"}


def test_nothing_left_of_the_bulk_is_all_rows() -> None:
    found = told(0, points(np.random.default_rng(0), 1000) + 6)
    assert (found.kind, found.strange) == ("all_rows", pytest.approx(1.0, abs=0.01))


def test_rows_that_became_less_strange_and_confidence_alone_cannot_be_told() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, C, 1000)
    nearer = told(0, CENTRES[y] + 0.7 * rng.normal(size=(1000, C)))
    assert (nearer.kind, nearer.strange) == ("cannot_tell", 0.0)
    assert math.isnan(nearer.lean_if_all)
    x = points(rng, 3000)
    probs = seen(x)[1]
    label, p = probs.argmax(1), rng.random(3000)
    surer = cells(label, probs.max(1) ** 0.3, p)[2000:]
    reference = update(start(C), cells(label, probs.max(1), p)[:2000], probs[:2000])
    found = compare(reference, surer)
    assert found.ks_confidence > found.ks_floor > found.ks_pvalue
    assert found.kind == "cannot_tell"


def test_without_pvalues_only_a_class_mix_is_told() -> None:
    rng = np.random.default_rng(0)

    def bare(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probs = seen(x)[1]
        return cells(probs.argmax(1), probs.max(1), None), probs

    reference = update(start(C), *bare(points(rng, 2000)))
    assert compare(reference, bare(points(rng, 1000))[0]).kind == "none"
    mixed = points(rng, 1000, np.array([0.7, 0.1, 0.1, 0.1]))
    assert compare(reference, bare(mixed)[0]).kind == "class_mix"
    doubtful = 0.6 * points(rng, 1000)
    assert compare(reference, bare(doubtful)[0]).kind == "cannot_tell"


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(1, 200), cut=st.integers(0, 200))
def test_totals_are_those_of_a_loop_however_rows_are_cut(seed: int, n: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(3, 0.3), n)
    label, confidence, pvalue = probs.argmax(1), probs.max(1), rng.random(n)
    kept = cells(label, confidence, pvalue)
    whole = update(start(3), kept, probs)
    labels, pvalues = np.zeros((3, 3)), np.zeros((20, 3))
    strange = [0, 0, 0]
    for row, k, p in zip(probs, label.tolist(), pvalue.tolist(), strict=True):
        labels[k] += row
        pvalues[next(b for b in range(20) if p <= (b + 1) / 20)] += row
        strange[k] += p <= 0.1
    np.testing.assert_allclose(np.reshape(whole.labels, (3, 3)), labels)
    np.testing.assert_allclose(np.reshape(whole.pvalues, (20, 3)), pvalues)
    assert sum(whole.confidences) == pytest.approx(n)
    assert (list(whole.strange), whole.n) == (strange, n)
    a, b = (update(start(3), kept[s], probs[s]) for s in (slice(0, cut), slice(cut, None)))
    for parts in (merge(a, b), update(from_json(to_json(a)), kept[cut:], probs[cut:])):
        assert (parts.n, parts.strange) == (whole.n, whole.strange)
        np.testing.assert_allclose(parts.labels, whole.labels, atol=1e-12)
        np.testing.assert_allclose(parts.pvalues, whole.pvalues, atol=1e-12)
        np.testing.assert_allclose(parts.confidences, whole.confidences, atol=1e-12)
    assert from_json(to_json(whole)) == whole


def test_the_figures_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    y = points(rng, 1000, np.array([0.4, 0.2, 0.2, 0.2]))
    y[:200] += 4
    found = told(0, y)
    before, _ = seen(points(np.random.default_rng((0, 1)), 2000))
    now, _ = seen(y)
    p, q = ((v // 15) % 20 for v in (before, now))  # bins of p-values, 15 of confidence
    assert found.ks_pvalue == pytest.approx(stats.ks_2samp(p, q).statistic)
    a, b = ((v % 15) for v in (before, now))
    assert found.ks_confidence == pytest.approx(stats.ks_2samp(a, b).statistic)
    counts = [np.bincount(v // 300, minlength=C) for v in (before, now)]
    want = stats.chi2_contingency(np.stack(counts), correction=False).pvalue
    assert found.classes == pytest.approx(want, rel=1e-6)
    left = (q >= 6).mean() / (p >= 6).mean()
    assert found.strange == pytest.approx(1 - left, abs=0.002)
    lean = math.log(((q >= 6) & (q < 13)).sum() / (q >= 13).sum())
    lean -= math.log(((p >= 6) & (p < 13)).sum() / (p >= 13).sum())
    assert found.lean == pytest.approx(lean, abs=0.002)
    # A normal score that moved by one step thins both halves of the bulk as it says.
    step = stats.norm.isf((q >= 6).mean()) - stats.norm.isf((p >= 6).mean())
    top = stats.norm.sf(stats.norm.isf((p >= 13).mean()) + step)
    between = (q >= 6).mean() - top
    even = math.log(between / top) - math.log(((p >= 6) & (p < 13)).mean() / (p >= 13).mean())
    assert found.lean_if_all == pytest.approx(even, abs=0.01)


def test_class_weights_are_those_of_single_rows() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(5, 0.1), 3000)
    label = probs.argmax(1)
    joint = np.zeros((5, 5))
    np.add.at(joint, label, probs / len(probs))
    window = rng.choice(5, 1000, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    found = shift_kind._class_weights(joint, probs.mean(0), np.bincount(window, minlength=5))
    given = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, em(probs.mean(0), given[window]), atol=1e-4)
    assert shift_kind._class_weights(np.zeros((2, 2)), np.zeros(2), np.array([1, 1])) is None


def test_few_rows_of_rare_classes_are_taken_together() -> None:
    rng = np.random.default_rng(0)
    many = 200
    said = 0
    for _ in range(200):
        share = rng.dirichlet(np.full(many, 0.05))
        a, b = (rng.choice(many, n, p=share) for n in (2000, 1000))
        counts = [np.bincount(v, minlength=many) for v in (a, b)]
        said += shift_kind._same_classes(counts[0].astype(float), counts[1]) < 0.01
    assert said <= 8  # a binomial of 200 and 1 % is 9 or more once in 5,000


def test_what_cannot_be_used() -> None:
    assert "new classes" in ASSUMES and set(KINDS) >= {"some_rows", "all_rows"}
    for classes in (1, MOST_CLASSES + 1):
        with pytest.raises(DataError, match="2 to 256 classes"):
            start(classes)
    kept = cells(np.array([0, 2]), np.array([0.5, 0.9]), np.array([0.1, 0.2]))
    with pytest.raises(DataError, match="class 2 are none of 2 classes"):
        update(start(2), kept, np.full((2, 2), 0.5))
    with pytest.raises(DataError, match=r"3 classes have probabilities of shape \(2, 2\)"):
        update(start(3), kept, np.full((2, 2), 0.5))
    known = update(start(3), kept, np.full((2, 3), 1 / 3))
    with pytest.raises(DataError, match="one has none"):
        compare(start(3), kept)
    with pytest.raises(DataError, match="one has none"):
        compare(known, kept[:0])
    with pytest.raises(DataError, match="3 and 2 classes"):
        merge(known, start(2))
    with pytest.raises(DataError, match="no number"):
        cells(np.array([0]), np.array([np.nan]), None)
    with pytest.raises(DataError, match="2 labels have 1"):
        cells(np.array([0, 1]), np.array([0.5]), None)
    saved = json.loads(to_json(known))
    saved["strange"] = saved["strange"][1:]
    for text in (json.dumps(saved), "[]", to_json(known).replace("shift_kind", "samples")):
        with pytest.raises(DataError):
            from_json(text)
