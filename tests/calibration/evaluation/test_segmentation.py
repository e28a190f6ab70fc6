"""The evaluation of segmentations against slow loops over pixels and sklearn."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from calibration.evaluation.images import ScoreMaps
from calibration.evaluation.records import Evaluation
from calibration.evaluation.segmentation import Segmentation, Segmented
from posthoc.contract import DataError

N, P, C = 12, 40, 3
SYSTEMS = ("frozen", "temperature scaled", "hedged")


def block(seed: int = 0, n: int = N, **more: Any) -> Segmented:
    """Random maps; the second image has one label, the third is all right, pixels lack some."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.normal(size=(n, P, C))
    probs = {}
    for name, heat in zip(SYSTEMS, (0.5, 1.0, 1.2), strict=True):
        e = np.exp(z / heat)
        probs[name] = (e / e.sum(2, keepdims=True)).astype(np.float32)
    label = z.argmax(2)
    y = np.where(rng.random((n, P)) < 0.6, label, rng.integers(0, C, (n, P)))
    y[2] = label[2]
    y[rng.random((n, P)) < 0.1] = -1
    y[1] = -1
    y[1, 5] = 0
    p = probs["hedged"]
    given: dict[str, Any] = {
        "probs": probs,
        "frozen": label,
        "label": label,
        "confidence": np.take_along_axis(p, label[..., None], 2)[..., 0],
        "sets": {0.1: p > 0.1, 0.3: p > 0.4},
        "y": y,
        "keys": rng.integers(0, 2**63, n).astype(np.uint64),
        "groups": np.arange(n).astype(np.uint64) // 2,
        "scores": {"hedged": rng.normal(size=(n, P)).astype(np.float32)},
        "held": rng.random((n, P)) < 0.2,
    }
    return Segmented(**(given | more))


def evaluated(*blocks: Segmented, **more: Any) -> Evaluation:
    made = Segmentation(C, (0.1, 0.3))
    for b in blocks:
        made.add(b)
    return made.result(**({"n_conformal": 50, "n_boot": 100} | more))


def known(b: Segmented, i: int) -> list[int]:
    return [p for p in range(P) if b.y[i, p] >= 0]


def test_means_over_images_by_slow_loops() -> None:
    b = block()
    found = evaluated(b)
    assert found.n == N and found.dense is not None
    assert found.dense.pixels == (b.y >= 0).sum()
    assert [s.name for s in found.systems] == list(SYSTEMS)
    for system in found.systems:
        p = b.probs[system.name].astype(np.float64)
        accuracy, nll, brier = [], [], []
        for i in range(N):
            k = known(b, i)
            accuracy.append(sum(b.label[i, j] == b.y[i, j] for j in k) / len(k))
            nll.append(sum(-math.log(p[i, j, b.y[i, j]]) for j in k) / len(k))
            brier.append(
                sum(sum((p[i, j, c] - (c == b.y[i, j])) ** 2 for c in range(C)) for j in k) / len(k)
            )
        for name, values in (("accuracy", accuracy), ("nll", nll), ("brier", brier)):
            figure = system.metrics[name]
            assert figure.value == pytest.approx(np.mean(values), rel=1e-6)
            assert figure.low is not None and figure.high is not None
            # The interval is that of a mean of 12 images, not of hundreds of pixels.
            error = np.std(values) / math.sqrt(N)
            assert 2 * error < figure.high - figure.low < 6 * error


def test_overlap_and_class_errors_of_all_pixels() -> None:
    b = block()
    found = evaluated(b)
    keep = b.y >= 0
    matrix = confusion_matrix(b.y[keep], b.label[keep], labels=range(C))
    iou = [matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in range(C)]
    assert found.dense is not None
    for c, one in enumerate(found.dense.classes):
        assert one.name == f"class {c}" and one.iou == pytest.approx(iou[c])
        assert one.share == pytest.approx((b.y[keep] == c).mean())
        for name in SYSTEMS:
            p = b.probs[name][keep][:, c].astype(np.float64)
            bins: dict[int, float] = {}
            for value, true in zip(p, b.y[keep] == c, strict=True):
                at = max(1, math.ceil(value * 20))
                bins[at] = bins.get(at, 0.0) + true - value
            assert one.ece[name] == pytest.approx(sum(map(abs, bins.values())) / keep.sum())
    for s in found.systems:
        assert s.metrics["mean_iou"].value == pytest.approx(np.mean(iou))
        mean = np.mean([c.ece[s.name] for c in found.dense.classes])
        assert s.metrics["class_ece"].value == pytest.approx(mean)


def test_errors_are_ranked_within_images_that_have_both() -> None:
    b = block()
    hedged = evaluated(b).systems[2].metrics
    areas, between = [], []
    for i in range(N):
        k = known(b, i)
        wrong = b.label[i, k] != b.y[i, k]
        if 0 < wrong.sum() < len(k):
            areas.append(roc_auc_score(wrong, -b.confidence[i, k]))
        if wrong.any():
            left = wrong[np.argsort(b.confidence[i, k])]  # the least certain first
            best = np.sort(wrong)[::-1]
            curves = [[v[j:].mean() / wrong.mean() for j in range(len(k))] for v in (left, best)]
            between.append(np.mean(curves[0]) - np.mean(curves[1]))
    assert 0 < len(areas) < N
    assert hedged["error_auroc"].value == pytest.approx(np.mean(areas))
    assert hedged["ause"].value == pytest.approx(np.mean(between))


def test_uncovered_pixels_by_slow_loops() -> None:
    b = block()
    found = evaluated(b)
    for level, sizes in zip(found.levels, found.set_sizes, strict=True):
        inside = b.sets[level.alpha]
        shares, size, several, count, empty = [], [], [], [0] * (C + 1), 0
        for i in range(N):
            k = known(b, i)
            shares.append(sum(not inside[i, j, b.y[i, j]] for j in k) / len(k))
            each = [int(inside[i, j].sum()) for j in k]
            size.append(np.mean(each))
            several.append(np.mean([e > 1 for e in each]))
            empty += each.count(0)
            for e in each:
                count[e] += 1
        assert level.images is not None and level.images.ambiguous is not None
        assert level.coverage == pytest.approx(1 - np.mean(shares))
        assert level.images.mean.value == pytest.approx(np.mean(shares))
        assert level.images.above.value == np.mean([s > level.alpha for s in shares])
        assert level.images.quantiles == pytest.approx(
            [sorted(shares)[math.ceil(q * N) - 1] for q in (0.5, 0.9, 0.99)]
        )
        assert sum(level.images.histogram.shares["test rows"]) == pytest.approx(1)
        assert level.mean_size == pytest.approx(np.mean(size))
        assert level.images.ambiguous.value == pytest.approx(np.mean(several))
        assert level.empty_share == pytest.approx(empty / sum(count))
        assert dict(zip(sizes.size, sizes.count, strict=True)) == {
            s: c for s, c in enumerate(count) if c
        }
        spread = 2.576 * np.std(shares) * math.sqrt(1 / 50 + 1 / (N - 1))
        assert level.band_low == pytest.approx(1 - level.alpha - spread)
        assert level.band_high == pytest.approx(min(1, 1 - level.alpha + 2 / 51 + spread))
    assert evaluated(b, everything=[0.1]).levels[0].band_low == 1


def test_answered_pixels() -> None:
    b = block()
    found = evaluated(b).answered
    keep = (b.y >= 0) & ~b.held
    assert found is not None and found.share == pytest.approx(keep.sum() / (b.y >= 0).sum())
    assert found.error == pytest.approx((b.label != b.y)[keep].mean())
    inside = np.take_along_axis(b.sets[0.1], np.maximum(b.y, 0)[..., None], 2)[..., 0]
    assert found.coverage == pytest.approx(inside[keep].mean())
    nobody = evaluated(block(held=np.ones((N, P), bool))).answered
    assert nobody is not None and nobody.share == 0
    assert evaluated(block(held=None)).answered is None


def test_batches_do_not_matter() -> None:
    b = block()
    pieces = []
    for at in (slice(0, 1), slice(1, 7), slice(7, N)):
        cut = {f.name: getattr(b, f.name) for f in dataclasses.fields(b)}
        for name, value in cut.items():
            if isinstance(value, dict):
                cut[name] = {k: v[at] for k, v in value.items()}
            elif value is not None:
                cut[name] = value[at]
        pieces.append(Segmented(**cut))
    whole = evaluated(b)
    assert evaluated(*pieces) == whole
    assert Evaluation.model_validate_json(whole.model_dump_json()) == whole


def test_images_of_one_subject_count_once() -> None:
    """Every image twice under one split key: the intervals stay, where twice the images would
    narrow them."""
    b = block()
    twice = block(
        probs={k: v.repeat(2, 0) for k, v in b.probs.items()},
        sets={k: v.repeat(2, 0) for k, v in b.sets.items()},
        scores={k: v.repeat(2, 0) for k, v in b.scores.items()},
        held=None,
        keys=b.keys.repeat(2),
        groups=np.arange(N).astype(np.uint64).repeat(2),
        **{k: getattr(b, k).repeat(2, 0) for k in ("frozen", "label", "confidence", "y")},
    )
    once, apart = evaluated(b), evaluated(twice)
    grouped = evaluated(twice, grouped=True)

    def wide(e: Evaluation, name: str) -> float:
        f = e.systems[2].metrics[name]
        assert f.low is not None and f.high is not None
        return f.high - f.low

    for name in ("nll", "mean_iou", "debiased_ece"):
        assert wide(grouped, name) == pytest.approx(wide(once, name), rel=1e-9)
        assert wide(apart, name) < 0.9 * wide(once, name)
    assert grouped.levels[0].band_low == pytest.approx(once.levels[0].band_low)


def test_strange_images_and_pixels() -> None:
    b = block()
    strange = ScoreMaps()
    rng = np.random.default_rng(1)
    maps = rng.normal(1, 1, (5, P)).astype(np.float32)
    for i in range(5):
        strange.add({"hedged": maps[i]}, i, i)
    found = evaluated(b, strange={"far": strange})
    score = b.scores["hedged"]
    means, strange_means = score.mean(1), maps.mean(1)
    image, pixel = found.ood
    assert (image.score, image.n_out) == ("hedged", 5)
    wins = [(s > m) + 0.5 * (s == m) for m in means for s in strange_means]
    assert image.auroc.value == pytest.approx(np.mean(wins))
    assert (pixel.score, pixel.n_out) == ("hedged, pixel by pixel", 5 * P)
    truth = np.r_[np.zeros(score.size), np.ones(maps.size)]
    whole = np.r_[score.ravel(), maps.ravel()]
    assert pixel.auroc.value == pytest.approx(roc_auc_score(truth, whole))
    assert [h.name for h in found.scores] == ["hedged", "hedged, pixel by pixel"]


def test_drawn_pixels_are_the_images_own() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 500))
    a, b = ScoreMaps(50), ScoreMaps(50)
    for i in range(3):
        a.add({"s": maps[i]}, 10 + i, i)
    for i in reversed(range(3)):
        b.add({"s": maps[i]}, 10 + i, i)
    assert a.sizes == [50] * 3
    for i in range(3):
        np.testing.assert_array_equal(a.drawn["s"][i], b.drawn["s"][2 - i])
        assert np.isin(a.drawn["s"][i], maps[i]).all() and len(set(a.drawn["s"][i])) == 50
        assert a.means["s"][i] == pytest.approx(maps[i].mean())


def test_several_annotators() -> None:
    rng = np.random.default_rng(3)
    b = block()
    annotations = rng.integers(0, C, (N, 3, P))
    annotations[0, 2] = -1  # two annotators saw it
    annotations[1, 1:] = -1  # one did: no distance
    annotations[2, 0, :7] = -1  # seven pixels that one of them left out
    b = block(annotations=annotations)
    found = evaluated(b)
    got = found.systems[2].metrics["ged"].value

    def distance(s: np.ndarray, t: np.ndarray) -> float:
        parts = []
        for c in range(1, C):
            union = ((s == c) | (t == c)).sum()
            parts.append(1 - ((s == c) & (t == c)).sum() / union if union else 0.0)
        return float(np.mean(parts))

    want = []
    for i in range(N):
        maps = [a for a in annotations[i] if (a >= 0).any()]
        if len(maps) < 2:
            continue
        k = np.all([a >= 0 for a in maps], axis=0)
        cross = np.mean([distance(b.label[i][k], a[k]) for a in maps])
        among = np.mean([distance(a[k], t[k]) for a in maps for t in maps])
        want.append(2 * cross - among)
    assert len(want) == N - 1
    assert got == pytest.approx(np.mean(want))
    assert "ged" not in evaluated(block()).systems[2].metrics


def test_a_mask_of_one_class_by_a_slow_loop() -> None:
    b = block()
    made = Segmentation(C, (0.1, 0.3), mask=2)
    made.add(b)
    found = made.result(n_conformal=50, n_boot=100, classes=("a", "b", "lesion"))
    assert found.set_sizes == ()
    assert found.answered is not None and found.answered.coverage is None
    for level in found.levels:
        missed, size, excess = [], [], []
        for i in range(N):
            k = known(b, i)
            mask = [bool(b.sets[level.alpha][i, j, 2]) for j in k]
            true = [b.y[i, j] == 2 for j in k]
            size.append(np.mean(mask))
            if any(true):
                missed.append(np.mean([not m for m, t in zip(mask, true, strict=True) if t]))
            if any(mask):
                excess.append(np.mean([not t for m, t in zip(mask, true, strict=True) if m]))
        assert level.images is not None and level.images.excess is not None
        assert level.images.n == len(missed) < N and level.images.mask == "lesion"
        assert level.images.mean.value == pytest.approx(np.mean(missed))
        assert level.coverage == pytest.approx(1 - np.mean(missed))
        assert level.mean_size == pytest.approx(np.mean(size))
        assert level.images.excess.value == pytest.approx(np.mean(excess))
        assert level.images.ambiguous is None


def test_a_mask_of_a_class_that_is_nowhere() -> None:
    b = block()
    b.y[b.y == 2] = 0
    made = Segmentation(C, (0.1,), mask=2)
    made.add(b)
    assert made.result(n_conformal=50, n_boot=10).levels == ()


def test_an_image_without_labels_is_refused() -> None:
    b = block()
    b.y[4] = -1
    with pytest.raises(DataError, match="image 4 has no labelled pixel"):
        evaluated(b)
