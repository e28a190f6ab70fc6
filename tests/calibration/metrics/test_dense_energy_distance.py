"""GED² against sets of pixels and the identities of an energy distance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.metrics.energy_distance import energy_distance, image_energy_distances
from posthoc.contract import DataError

modest = settings(deadline=None, derandomize=True, max_examples=60)


def iou_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - IoU by sets of pixels; 0 for two empty masks."""
    one, other = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    return 1 - len(one & other) / len(one | other) if one | other else 0.0


def ged(samples: np.ndarray, annotations: np.ndarray, classes: list[int]) -> float:
    def d(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([iou_distance(a == c, b == c) for c in classes]))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([d(a, b) for a in x for b in y]))

    cross = mean(samples, annotations)
    return 2 * cross - mean(samples, samples) - mean(annotations, annotations)


@modest
@given(
    seed=st.integers(0, 1000),
    s=st.integers(1, 5),
    a=st.integers(1, 4),
    height=st.integers(1, 9),
    rare=st.booleans(),
)
def test_it_is_its_definition(seed: int, s: int, a: int, height: int, rare: bool) -> None:
    rng = np.random.default_rng(seed)
    shares = [0.95, 0.05, 0.0] if rare else [0.4, 0.3, 0.3]
    maps = rng.choice(3, (s + a, height, 7), p=shares)
    found = energy_distance(maps[:s], maps[s:], classes=[1, 2])
    assert found.squared == pytest.approx(ged(maps[:s], maps[s:], [1, 2]), abs=1e-12)
    assert found.squared >= -1e-12
    masks = maps == 1
    one = energy_distance(masks[:s], masks[s:])
    assert one.squared == pytest.approx(ged(maps[:s], maps[s:], [1]), abs=1e-12)
    assert one == energy_distance(maps[:s], maps[s:], classes=[1])
    swapped = energy_distance(maps[s:], maps[:s], classes=[1, 2])
    assert swapped.squared == pytest.approx(found.squared, abs=1e-12)
    assert (swapped.diversity, swapped.disagreement) == (found.disagreement, found.diversity)


def test_equal_multisets_are_at_distance_zero_in_any_order_and_multiplicity() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((4, 30, 30)) < 0.3
    masks[2] = False
    shuffled = masks[rng.permutation(4)]
    assert energy_distance(masks, shuffled).squared == pytest.approx(0, abs=1e-12)
    assert energy_distance(np.repeat(masks, 3, axis=0), shuffled).squared == pytest.approx(
        0, abs=1e-12
    )
    assert energy_distance(masks, masks[:2]).squared > 0


def test_empty_masks() -> None:
    empty, full = np.zeros((2, 5, 5), bool), np.ones((3, 5, 5), bool)
    assert energy_distance(empty, empty).squared == 0
    assert energy_distance(empty, full).squared == 2
    assert energy_distance(empty, full).cross == 1


def test_members_that_disagree_as_the_annotators_do_beat_one_answer() -> None:
    """The model's own distribution wins over its mean, which is what the figure is for."""
    rng = np.random.default_rng(0)
    grid = np.hypot(*np.meshgrid(np.arange(40) - 20, np.arange(40) - 20))

    annotations = np.stack([grid < r for r in [5.0, 15.0] * 4])
    several = energy_distance(
        np.stack([grid < r for r in rng.choice([5.0, 15.0], 32)]), annotations
    )
    single = energy_distance((grid < 10)[None], annotations)
    assert several.squared < 0.2 * single.squared
    assert single.diversity == 0 and several.diversity > 0.3
    # Pixels drawn one by one from the same marginal probabilities are no segmentations.
    p = annotations.mean(axis=0)
    grains = energy_distance(rng.random((32, 40, 40)) < p, annotations)
    assert grains.squared > 5 * several.squared


def test_columns_take_images_of_any_number_of_samples() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.random((s, 6, 6)) < 0.5 for s in (1, 4, 2)]
    annotations = [rng.random((a, 6, 6)) < 0.5 for a in (3, 1, 2)]
    columns = image_energy_distances(samples, annotations)
    for i, pair in enumerate(zip(samples, annotations, strict=True)):
        one = energy_distance(*pair)
        assert columns["ged"][i] == one.squared
        assert columns["diversity"][i] == one.diversity
        assert columns["disagreement"][i] == one.disagreement


def test_what_cannot_be_compared_is_named() -> None:
    masks, labels = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), int)
    with pytest.raises(DataError, match="do not match annotations"):
        energy_distance(masks, masks[:, :3])
    with pytest.raises(DataError, match="do not match annotations"):
        energy_distance(masks[:0], masks)
    with pytest.raises(DataError, match="samples are bool where annotations are int64"):
        energy_distance(masks, labels, [1])
    for pair, classes in (((masks, masks), [1]), ((labels, labels), None)):
        with pytest.raises(DataError, match="bool masks, or class indices"):
            energy_distance(*pair, classes)
    with pytest.raises(DataError, match="bool masks, or class indices"):
        energy_distance(labels / 2, labels / 2, [1])
    with pytest.raises(DataError, match="no class counts"):
        energy_distance(labels, labels, [])
