"""What every change-point detector must do, whichever it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.drift.detector import DEFAULT, DETECTORS, Found, detector, run
from posthoc.contract import DataError, HedgedError

modest = settings(deadline=None, derandomize=True, max_examples=30)
every = pytest.mark.parametrize("name", DETECTORS)


def normal(seed: int, n: int, dims: int | None = None) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n if dims is None else (n, dims))


def alarms(found: list[Found]) -> list[int]:
    return [i for i, f in enumerate(found) if f.alarm]


def future(name: str, state: Any, xs: Any) -> tuple[str, list[Found]]:
    state, found = run(detector(name), state, xs)
    return detector(name).to_json(state), found


def test_the_default_is_one_of_them() -> None:
    assert DEFAULT in DETECTORS
    with pytest.raises(DataError, match=r"'nothing'.*cusum"):
        detector("nothing")


@every
@pytest.mark.parametrize("shift", [2.0, -2.0, 5.0, -20.0, 1000.0])
def test_a_shift_is_found_placed_and_becomes_normal(name: str, shift: float) -> None:
    d = detector(name)
    state = d.start(normal(0, 200))
    state, before = run(d, state, normal(1, 300))
    assert not alarms(before)
    state, during = run(d, state, normal(2, 130) + shift)
    (at,) = alarms(during)
    assert at < 30
    change = during[at].change
    assert change is not None and abs(change - 300) <= 8
    assert all(f.change is None for i, f in enumerate(during) if i != at)
    # The next 100 are the new regime, learnt without alarm; the 101st is tested again.
    assert [i for i, f in enumerate(during) if f.learning] == list(range(at + 1, at + 101))
    state, after = run(d, state, normal(3, 300) + shift)
    assert not alarms(after)
    _, back = run(d, state, normal(4, 40))
    assert back[alarms(back)[0]].change == pytest.approx(730, abs=8)


@every
def test_lone_outliers_are_no_change(name: str) -> None:
    """One in sixty, of every kind; and one in twenty for those that are not plain BOCD."""
    for gap in (60,) if name == "bocd" else (60, 20):
        for value in (5.0, 10.0, -10.0, 1e6, 1e300, -1e308):
            d, xs = detector(name), normal(5, 600)
            xs[np.arange(7, 600, gap)] = value
            assert not alarms(run(d, d.start(normal(6, 200)), xs)[1]), value


@every
def test_evidence_lies_between_0_and_1_and_the_alarm_is_its_height(name: str) -> None:
    d = detector(name)
    found = run(d, d.start(normal(0, 200)), np.concatenate((normal(1, 100), normal(2, 20) + 3)))[1]
    evidence = np.array([f.evidence for f in found])
    assert evidence.min() >= 0 and evidence.max() <= 1
    assert evidence.argmax() == alarms(found)[0]


@every
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("cut", [0, 1, 60, 119, 140, 260, 330])
def test_a_restored_state_has_the_same_future_bit_by_bit(name: str, dims: int, cut: int) -> None:
    d, xs = detector(name), normal(1, 400, dims)
    xs[120:, 0] += 4  # cut 140 falls into the learning of the new regime
    state, _ = run(d, d.start(normal(0, 200, dims)), xs[:cut])
    text = d.to_json(state)
    restored = d.from_json(text)
    assert d.to_json(restored) == text
    assert future(name, restored, xs[cut:]) == future(name, state, xs[cut:])


@every
def test_a_step_leaves_the_state_before_it_as_it_was(name: str) -> None:
    d = detector(name)
    state, _ = run(d, d.start(normal(0, 200)), normal(1, 120))
    text = d.to_json(state)
    once, again = (future(name, state, normal(2, 50) + 3) for _ in range(2))
    assert once == again and d.to_json(state) == text


@every
def test_scale_and_origin_of_the_stream_do_not_matter(name: str) -> None:
    d, reference, xs = detector(name), normal(0, 200), normal(1, 200)
    xs[150:] += 2
    plain = run(d, d.start(reference), xs)[1]
    exact = run(d, d.start(reference * 2.0**-20), xs * 2.0**-20)[1]
    assert exact == plain
    moved = run(d, d.start(0.7 - 0.01 * reference), 0.7 - 0.01 * xs)[1]
    assert [(f.alarm, f.change) for f in moved] == [(f.alarm, f.change) for f in plain]
    np.testing.assert_allclose([f.evidence for f in moved], [f.evidence for f in plain], atol=1e-6)


@every
def test_one_dimension_is_a_scalar(name: str) -> None:
    d, xs = detector(name), normal(1, 150) + np.repeat([0.0, 3.0], 75)
    scalar = future(name, d.start(normal(0, 200)), xs.tolist())
    assert scalar == future(name, d.start(normal(0, 200)[:, None]), xs[:, None])
    assert scalar == future(name, d.start(normal(0, 200).tolist()), [np.float64(x) for x in xs])


@every
def test_a_change_of_one_dimension_of_three_is_found(name: str) -> None:
    d, xs = detector(name), normal(1, 240, 3)
    xs[200:, 1] -= 3
    state, found = run(d, d.start(normal(0, 200, 3) * [1, 10, 0.1]), xs * [1, 10, 0.1])
    assert 200 <= alarms(found)[0] < 230 and len(alarms(found)) == 1
    assert len(d.to_json(state)) < 30_000


@every
def test_the_state_stays_small(name: str) -> None:
    d = detector(name)
    state, _ = run(d, d.start(normal(0, 200)), normal(1, 600))
    assert len(d.to_json(state)) < 10_000


@every
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (float("nan"), "nan is NaN or infinite"),
        (float("-inf"), "-inf is NaN or infinite"),
        (None, "no number"),
        ("many", "no number"),
        ([1.0, 2.0], "2 numbers where the stream has 1"),
        ([], "0 numbers"),
    ],
)
def test_an_observation_that_is_no_number_is_refused_and_changes_nothing(
    name: str, x: Any, says: str
) -> None:
    d = detector(name)
    state, _ = run(d, d.start(normal(0, 200)), normal(1, 20))
    text = d.to_json(state)
    with pytest.raises(DataError, match=says):
        d.step(state, x)
    assert d.to_json(state) == text


@every
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (np.zeros(0), "0 points where 50"),
        (normal(0, 49), "49 points where 50"),
        (np.full(200, 0.3), "dimension 0 of the reference is constant"),
        (np.full(200, 0.1) + np.repeat([0, 1e-17], 100), "constant"),
        (np.stack((normal(0, 90), np.ones(90)), axis=1), "dimension 1 of the reference is const"),
        (np.where(np.arange(200) == 7, np.nan, normal(0, 200)), "point 7 of the reference is NaN"),
        (np.where(np.arange(200) == 9, np.inf, normal(0, 200)), "point 9"),
        (np.zeros((100, 0)), "N×D numbers"),
        (np.zeros((100, 2, 2)), "N×D numbers"),
        (np.repeat([1.5e308, -1.5e308], 50), "beyond what a float holds"),
        ("a stream", "no array of numbers"),
    ],
)
def test_a_reference_that_will_not_do_is_refused(name: str, reference: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        detector(name).start(reference)


@every
def test_settings_out_of_range_are_refused(name: str) -> None:
    wrong = {
        "cusum": [{"slack": 2.0}, {"limit": 0.0}, {"clip": float("inf")}, {"relearn": 49}],
        "bocd": [
            {"keep": 1},
            {"hazard": 0.0},
            {"hazard": [0.1, 1.0]},
            {"hazard": []},
            {"contamination": 1.0},
            {"threshold": 1.0},
            {"recent": 201, "relearn": 201},
            {"recent": 101},
            {"least": 51},
            {"clip": float("nan")},
            {"broad": 0.0},
            {"relearn": 10, "recent": 10},
        ],
    }
    wrong["dsm"] = [*wrong["bocd"], {"omega": 0.0}, {"omega": float("nan")}]
    for given_ in wrong[name]:
        with pytest.raises(DataError):
            detector(name).start(normal(0, 200), **given_)


@every
def test_a_new_regime_may_be_constant(name: str) -> None:
    """It keeps the spread of the old one, and the detector goes on."""
    d = detector(name)
    state, found = run(d, d.start(normal(0, 200)), np.full(150, 4.0))
    assert len(alarms(found)) == 1 and not found[-1].learning
    assert state.scale.centre == (4.0,) and 0.5 < state.scale.spread[0] < 2
    assert alarms(run(d, state, normal(1, 40) + 9)[1])


@every
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_a_stream_of_mostly_equal_values_has_a_scale(name: str, rate: float) -> None:
    rng = np.random.default_rng(0)
    reference = (rng.random(200) < rate).astype(float)
    state = detector(name).start(reference)
    assert state.scale.centre == (pytest.approx(reference.mean()),)
    assert state.scale.spread == (pytest.approx(reference.std()),)


@every
def test_no_part_of_a_state_is_a_state(name: str) -> None:
    d = detector(name)
    state, _ = run(d, d.start(normal(0, 200)), normal(1, 10))
    text = d.to_json(state)
    for end in range(len(text)):
        with pytest.raises(DataError, match=f"no saved state of the drift detector '{name}'"):
            d.from_json(text[:end])
    for other in DETECTORS:
        if other != name:
            with pytest.raises(DataError, match="start the detector anew"):
                detector(other).from_json(text)
    for wrong in ("null", "[]", "{}", text + "x", text.replace('"version":1', '"version":2')):
        with pytest.raises(DataError):
            d.from_json(wrong)


LEAVES = st.sampled_from(
    [None, True, -1, 0, 1, 3.5, -0.5, 1e308, 10**30, "x", [], {}, [[]], [1], [[1.0]], "1e999"]
)


@every
@given(data=st.data())
@modest
def test_an_altered_state_is_refused_or_works(name: str, data: st.DataObject) -> None:
    d, dims = detector(name), data.draw(st.sampled_from([1, 2]))
    xs = normal(1, 150, dims) + np.repeat([0.0, 5.0], 75)[:, None]
    state, _ = run(d, d.start(normal(0, 200, dims)), xs[: data.draw(st.sampled_from([5, 100]))])
    tree = json.loads(d.to_json(state))
    place: Any = tree
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        value = data.draw(LEAVES)
        if value == []:
            del place[key]
        else:
            place[key] = float("inf") if value == "1e999" else value
        break
    try:
        altered = d.from_json(json.dumps(tree).replace("Infinity", "1e999"))
    except HedgedError:
        return
    again, _ = run(d, altered, xs[:3])
    assert d.from_json(d.to_json(again)) is not None


@given(st.lists(st.floats(-1e308, 1e308), min_size=1, max_size=60))
@modest
@every
def test_any_finite_stream_is_taken(name: str, xs: list[float]) -> None:
    d = detector(name)
    state, found = run(d, d.start(normal(0, 60) * 1e-3), xs)
    assert all(0 <= f.evidence <= 1 for f in found)
    assert d.to_json(d.from_json(d.to_json(state))) == d.to_json(state)
