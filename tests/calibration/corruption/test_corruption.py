"""What every corruption promises, whatever it does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.corruption import CORRUPTIONS, Kind, corrupt, kind_of, measure, merge
from calibration.corruption.streams import normals, streams, uniforms
from posthoc.contract import DataError, TensorSpec
from tests.calibration.corruption.cases import EVERY, inputs

every = pytest.mark.parametrize(("kind", "name"), EVERY)
DRAWN = [(k, n) for k, n in EVERY if n not in ("blur", "contrast")]  # these draw nothing


def change(a: dict[str, np.ndarray], b: dict[str, np.ndarray], how: Any = np.abs) -> float:
    return float(sum(how(a[k].astype(float) - b[k].astype(float)).mean() for k in a))


def same(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@every
def test_a_row_is_the_same_in_any_batch_and_order(kind: Kind, name: str) -> None:
    x = inputs(kind)
    known, index = measure(x), np.arange(40)
    whole = corrupt(x, name, 3, known, keys=index)
    for step in (1, 7, 39):
        parts = [
            corrupt(
                {k: v[i : i + step] for k, v in x.items()}, name, 3, known, keys=index[i : i + step]
            )
            for i in range(0, 40, step)
        ]
        same({k: np.concatenate([p[k] for p in parts]) for k in x}, whole)
    order = np.random.default_rng(1).permutation(40)
    moved = corrupt({k: v[order] for k, v in x.items()}, name, 3, known, keys=index[order])
    same(moved, {k: v[order] for k, v in whole.items()})
    backwards = {k: x[k] for k in reversed(x)}
    same(dict(sorted(corrupt(backwards, name, 3, known, keys=index).items())), _sorted(whole))


@every
def test_rows_across_blocks_are_as_they_are_alone(
    kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(kind)
    known = measure(x)
    want = corrupt(x, name, 2, known)
    monkeypatch.setattr("calibration.corruption.streams._HELD", 300)
    same(corrupt(x, name, 2, known), want)


@every
def test_equal_rows_share_what_is_drawn_where_content_is_the_key(kind: Kind, name: str) -> None:
    x = inputs(kind)
    double = {k: np.concatenate([v, v]) for k, v in x.items()}
    got = corrupt(double, name, 4, measure(x))
    same({k: v[:40] for k, v in got.items()}, {k: v[40:] for k, v in got.items()})


@every
def test_the_same_seed_gives_the_same_and_inputs_stay(kind: Kind, name: str) -> None:
    x = inputs(kind)
    before = {k: v.copy() for k, v in x.items()}
    known = measure(x)
    first, again, other = (corrupt(x, name, 5, known, seed=s) for s in (0, 0, 1))
    same(first, again)
    same(x, before)
    assert (change(first, other) > 0) == ((kind, name) in DRAWN)
    assert change(first, x) > 0


@every
def test_shapes_and_dtypes_stay_and_severities_go_on(kind: Kind, name: str) -> None:
    x = inputs(kind, 200)
    known = measure(x)
    steps = [corrupt(x, name, s, known) for s in range(1, 6)]
    for got in steps:
        assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
            k: (v.shape, v.dtype) for k, v in x.items()
        }
    # Tokens are names: how many are others is what counts.
    how = (lambda d: d != 0) if kind == "tokens" else np.abs
    changes = [change(got, x, how) for got in steps]
    assert changes[0] > 0
    assert all(a < b for a, b in pairwise(changes)), changes


@every
def test_a_severity_is_one_of_five(kind: Kind, name: str) -> None:
    x = inputs(kind)
    for severity in (0, 6, -1, 2.5):
        with pytest.raises(DataError, match=r"severity .* is none of 1, 2, 3, 4 and 5"):
            corrupt(x, name, severity, measure(x))  # type: ignore[arg-type]


@every
def test_no_rows_are_no_rows_and_a_single_array_is_one(kind: Kind, name: str) -> None:
    x = inputs(kind)
    known = measure(x)
    none = corrupt({k: v[:0] for k, v in x.items()}, name, 1, known)
    assert {k: v.shape for k, v in none.items()} == {k: (0, *v.shape[1:]) for k, v in x.items()}
    bare = next(iter(x.values()))
    got = corrupt(bare, name, 3, measure(bare, kind))
    assert isinstance(got, np.ndarray) and got.shape == bare.shape and (got != bare).any()


@every
def test_a_reference_in_parts_is_the_whole(kind: Kind, name: str) -> None:
    x = inputs(kind)
    parts = [measure({k: v[i : i + 13] for k, v in x.items()}) for i in range(0, 40, 13)]
    folded = parts[0]
    for part in parts[1:]:
        folded = merge(folded, part)
    same(corrupt(x, name, 3, folded), corrupt(x, name, 3, measure(x)))


@every
def test_keys_are_one_integer_a_row(kind: Kind, name: str) -> None:
    x = inputs(kind)
    for keys in (np.arange(39), np.arange(40.0), np.zeros((40, 1), int)):
        with pytest.raises(DataError, match="keys are 40 integers"):
            corrupt(x, name, 1, measure(x), keys=keys)


@every
def test_inputs_unlike_the_reference_are_named(kind: Kind, name: str) -> None:
    x = inputs(kind)
    known, first = measure(x), next(iter(x))
    with pytest.raises(DataError, match=f"input '{first}'"):
        corrupt({k: v for k, v in x.items() if k != first}, name, 1, known)
    with pytest.raises(DataError, match=f"input '{first}'"):
        corrupt({**x, first: np.zeros((40, 2, 2, 2, 2), np.float32)}, name, 1, known)
    with pytest.raises(DataError, match="same rows"):
        corrupt({**x, first: x[first][:9]}, name, 1, known)


def test_names_are_known_and_summed_up() -> None:
    for known in CORRUPTIONS.values():
        for name, corruption in known.items():
            assert name.isidentifier() and 0 < len(corruption.summary) < 80
    with pytest.raises(DataError, match=r"no corruption of tables is called 'blur'; there are mis"):
        corrupt(inputs("tables"), "blur", 1, measure(inputs("tables")))
    with pytest.raises(DataError, match="no kind of inputs is called 'sounds'"):
        measure(np.zeros((2, 2)), "sounds")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_kind_is_told_by_shapes(kind: Kind) -> None:
    x = inputs(kind)
    assert kind_of(x) == kind
    specs = {
        k: TensorSpec(name=k, dtype=str(v.dtype), shape=(-1, *v.shape[1:])) for k, v in x.items()
    }
    assert kind_of(specs) == kind
    assert kind_of({**x, "seen": np.zeros(40, bool)}) == kind


def test_inputs_that_fit_none_or_several_are_named() -> None:
    with pytest.raises(DataError, match=r"no corruption fits input 'film' \(float32, 5 axes\)"):
        kind_of({"film": np.zeros((2, 3, 4, 5, 6), np.float32)})
    with pytest.raises(DataError, match="the input"):
        kind_of(np.zeros((3, 3), bool))
    with pytest.raises(DataError, match=r"several kinds: input 'x' \(images\), input 'age'"):
        kind_of({"x": np.zeros((2, 3, 4, 4)), "age": np.zeros(2)})
    both = {"x": np.random.default_rng(0).random((2, 3, 4, 4)), "age": np.zeros(2)}
    got = corrupt(both, "noise", 3, measure(both, "images"))
    assert (got["x"] != both["x"]).any() and (got["age"] == both["age"]).all()
    masked = {"ids": np.ones((2, 5), np.int64), "mask": np.ones((2, 5), np.float32)}
    assert kind_of(masked) == "tokens"
    for kind in CORRUPTIONS:
        with pytest.raises(DataError, match="input 'film'"):
            measure({"film": np.zeros((2, 3, 4, 5, 6), np.float32)}, kind)
    with pytest.raises(DataError, match="input 'one' is a scalar"):
        measure({"one": np.float32(1)}, "tables")


def test_numbers_of_a_row_are_uniform_normal_and_apart() -> None:
    keys = np.arange(4000, dtype=np.uint64)
    u = uniforms(streams(keys, 0, "noise", "x"), 50)
    z = normals(streams(keys, 0, "noise", "x"), 51)
    assert u.min() >= 0 and u.max() < 1 and z.shape == (4000, 51)
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / u.size - 0.05).max() < 0.002
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1
    for rows in (u - 0.5, z):  # neighbouring keys, and places in a row, have nothing in common
        assert np.abs(np.corrcoef(rows.T) - np.eye(rows.shape[1])).max() < 0.08
        assert abs(np.corrcoef(rows[1:].ravel(), rows[:-1].ravel())[0, 1]) < 0.01
    others = [uniforms(streams(keys, *w), 1) for w in ((1, "noise", "x"), (0, "noise", "y"))]
    assert all(abs(np.corrcoef(u[:, 0], o[:, 0])[0, 1]) < 0.05 for o in others)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    where=st.sampled_from(EVERY),
    n=st.integers(1, 6),
    severity=st.integers(1, 5),
    seed=st.integers(-(2**70), 2**70),
)
def test_any_seed_and_few_rows_will_do(
    where: tuple[Kind, str], n: int, severity: int, seed: int
) -> None:
    kind, name = where
    x = inputs(kind, 40)
    few = {k: v[:n] for k, v in x.items()}
    got = corrupt(few, name, severity, measure(x), seed=seed)
    again = corrupt({k: v[:1] for k, v in x.items()}, name, severity, measure(x), seed=seed)
    same({k: v[:1] for k, v in got.items()}, again)


def _sorted(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(sorted(x.items()))
