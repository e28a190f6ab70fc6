"""Maps and their pixels, against loops over images, rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from posthoc.contract import DataError
from posthoc.data import Rows
from posthoc.graph import Fragment, standalone
from posthoc.pixels import (
    Layout,
    at,
    draw,
    emit_maps,
    emit_per_row,
    emit_rows,
    emit_sizes,
    pixels,
    sampled,
    size,
    sizes,
    taken,
)
from posthoc.runtime import open_session

AXES = (1, -1, None)
SPATIAL = ((5,), (3, 4), (4, 4), (2, 3, 2))


def maps(n: int, c: int, spatial: tuple[int, ...], axis: int | None, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = spatial if axis is None else (c, *spatial) if axis == 1 else (*spatial, c)
    return rng.normal(size=(n, *shape)).astype(np.float32)


def looped(value: np.ndarray, axis: int | None) -> np.ndarray:
    """N×P×C, one pixel at a time, the last spatial axis fastest."""
    found = []
    for image in value:
        spatial = (
            image.shape if axis is None else image.shape[1:] if axis == 1 else image.shape[:-1]
        )
        rows = []
        for place in np.ndindex(*spatial):
            pixel = image[(slice(None), *place)] if axis == 1 else image[place]
            rows.append(np.atleast_1d(pixel))
        found.append(rows)
    return np.asarray(found)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_pixels_are_numbered_in_the_order_of_the_spatial_axes(
    axis: int | None, spatial: tuple[int, ...]
) -> None:
    value = maps(3, 4, spatial, axis)
    want = looped(value, axis)
    np.testing.assert_array_equal(pixels(value, axis), want)
    index = np.random.default_rng(1).integers(0, want.shape[1], (3, 6))
    some = np.stack([want[i, index[i]] for i in range(3)])
    np.testing.assert_array_equal(at(value, axis, index), some)
    assert pixels(value[:0], axis).shape == (0, *want.shape[1:])
    assert at(value[:0], axis, index[:0]).shape == (0, 6, want.shape[2])


def run(fragment: Fragment, outputs: dict[str, Any], feed: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(v) for v in open_session(standalone(fragment, outputs)).run(None, feed)]


@pytest.mark.parametrize("opset", [13, 18, 20])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("out_axis", AXES)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_the_graph_takes_maps_apart_and_puts_fields_together(
    axis: int | None, out_axis: int | None, spatial: tuple[int, ...], opset: int
) -> None:
    """Rows of z are `pixels`, and a field's map holds them where `taken` finds them."""
    layout = Layout(axis, out_axis, (-1,) * len(spatial))
    shape = maps(1, 3, spatial, axis).shape[1:]
    g = Fragment(opset)
    z = g.input("z", "float32", ["N", *(f"d{i}" for i in range(len(shape)))])
    lengths = emit_sizes(g, z, axis, len(spatial))
    rows = emit_rows(g, z, axis)
    width = 1 if axis is None else 3
    first = g.op("Squeeze", g.op("Slice", rows, *(g.const([k], "int64") for k in (0, 1, 1))),
                 g.const([1], "int64"))  # fmt: skip
    spread = g.op("Mul", g.unsqueeze(rows, 2), g.const([[[1.0, 10.0]]]))
    fields = {"C": (rows, (width,)), "": (first, ()), "CQ": (spread, (width, 2))}
    outputs: dict[str, Any] = {"sizes": ("int64", (-1,)), "rows": ("float32", (-1, width))}
    g.op("Identity", lengths, out="sizes")
    g.op("Identity", rows, out="rows")
    for name, (tensor, tail) in fields.items():
        made = emit_maps(g, tensor, lengths, layout, tail)
        key = f"f{name}"
        g.op("Identity", made, out=key)
        outputs[key] = ("float32", (-1, *layout.shape(*tail[:1] or (0,)), *tail[1:]))
    for n in (3, 1, 0):
        value = maps(n, 3, spatial, axis)
        want = pixels(value, axis)
        got = dict(zip(outputs, run(g, outputs, {"z": value}), strict=True))
        np.testing.assert_array_equal(got["sizes"], [n, *spatial])
        np.testing.assert_array_equal(got["rows"], want.reshape(-1, width))
        every = np.tile(np.arange(want.shape[1]), (n, 1))
        exact = {"C": want, "": want[..., 0], "CQ": want[..., None] * np.float32([1.0, 10.0])}
        for name, (_, tail) in fields.items():
            made = got[f"f{name}"]
            known = Layout(axis, out_axis, spatial)
            assert made.shape == (n, *known.shape(*tail[:1] or (0,)), *tail[1:])
            flat = exact[name].reshape(-1, *tail)
            np.testing.assert_array_equal(taken(made, layout, name, every), flat)
            if n == 0:
                continue
            place = tuple(d - 1 for d in spatial)  # the last pixel, by hand
            first_axis = bool(tail) and out_axis != -1 and not (out_axis is None and width == 1)
            last = made[(0, slice(None), *place) if first_axis else (0, *place)]
            np.testing.assert_array_equal(last.reshape(tail), exact[name][0, -1].reshape(tail))


@pytest.mark.parametrize("axis", [1, -1])
def test_maps_flattened_by_the_model_give_flat_fields(axis: int) -> None:
    """z N×C×H×W behind an output N×C×(HW): the sizes are those of the output."""
    value = maps(2, 3, (3, 4), axis)
    layout = Layout(axis, 1, (-1,))
    g = Fragment(17)
    z = g.input("z", "float32", ["N", "a", "b", "c"])
    lengths = emit_sizes(g, z, axis, 1)
    g.op("Identity", emit_maps(g, emit_rows(g, z, axis), lengths, layout, (3,)), out="y")
    (y,) = run(g, {"y": ("float32", (-1, 3, -1))}, {"z": value})
    np.testing.assert_array_equal(y, np.moveaxis(looped(value, axis), -1, 1))
    assert sizes(value, axis, layout) == (12,)
    assert sizes(value, axis, Layout(axis, 1, (-1, -1))) == (3, 4)


@pytest.mark.parametrize("axis", AXES)
def test_run_time_levels_belong_to_images(axis: int | None) -> None:
    """One number for all images, or one for each, is held against every pixel of its image."""
    value = maps(4, 2, (2, 3), axis)
    g = Fragment(17)
    z = g.input("z", "float32", ["N", *"abc"[: value.ndim - 1]])
    q = g.input("q", "float32", ["R"])
    g.op("Identity", emit_per_row(g, q, emit_sizes(g, z, axis, 2), 2), out="y")
    levels = np.float32([0.1, 0.2, 0.3, 0.4])
    (each,) = run(g, {"y": ("float32", (-1,))}, {"z": value, "q": levels})
    np.testing.assert_array_equal(each, levels.repeat(6))
    (all_,) = run(g, {"y": ("float32", (-1,))}, {"z": value, "q": levels[:1]})
    np.testing.assert_array_equal(all_, np.full(24, levels[0]))


def test_sizes_of_fields() -> None:
    assert Layout(1, 1, (4, 6)).shape(3) == (3, 4, 6)
    assert Layout(1, -1, (4, 6)).shape(3) == (4, 6, 3)
    assert Layout(1, None, (4, 6)).shape(3) == (3, 4, 6)
    assert Layout(1, None, (4, 6)).shape(1) == (4, 6)
    assert Layout(1, 1, (4, 6)).shape(1) == (1, 4, 6)
    assert Layout(1, -1, (-1, -1)).shape(0) == (-1, -1)
    assert size((4, 6)) == 24 and size((4, -1)) == 0


# ---- the draw


KEYS = np.random.default_rng(0).integers(0, 2**63, 3000).astype(np.uint64)


def test_every_labelled_pixel_is_drawn_as_often_as_any_other() -> None:
    labelled = np.ones((len(KEYS), 12), bool)
    labelled[:, [2, 7]] = False
    found = draw(KEYS, labelled, 4)
    assert all(len(set(row)) == 4 for row in found.tolist())
    # Each place of the draw is uniform by itself: one pixel may stand for its image.
    for column in (found, found[:, :1], found[:, 3:]):
        counts = np.bincount(column.ravel(), minlength=12)
        assert counts[2] == counts[7] == 0
        expected = column.size / 10
        statistic = ((counts[counts > 0] - expected) ** 2 / expected).sum()
        assert statistic < chi2.ppf(0.999, 9)


def test_few_labelled_pixels_are_taken_as_often_as_it_takes() -> None:
    labelled = np.zeros((len(KEYS), 12), bool)
    labelled[:, [1, 4, 9]] = True
    found = draw(KEYS, labelled, 8)
    counts = np.stack([(found == p).sum(1) for p in (1, 4, 9)], 1)
    assert (counts.sum(1) == 8).all() and counts.min() == 2 and counts.max() == 3
    # The two that are over fall on all alike, so that a mean over the draw is unbiased.
    error = counts.mean(0) - 8 / 3
    assert np.abs(error).max() < 4 * np.sqrt(2 / 9 / len(KEYS))
    assert (draw(KEYS[:1], labelled[:1] & (np.arange(12) == 4), 5) == 4).all()


def test_a_draw_depends_on_the_image_alone() -> None:
    labelled = np.ones((20, 50), bool)
    whole = draw(KEYS[:20], labelled, 6)
    np.testing.assert_array_equal(draw(KEYS[5:8], labelled[5:8], 6), whole[5:8])
    np.testing.assert_array_equal(draw(KEYS[:20], labelled, 6), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 20


# ---- images and their maps as rows


def rows_of(y: np.ndarray | None, n: int, **more: Any) -> Rows:
    keys = KEYS[:n]
    return Rows(
        **{
            "inputs": {"x": np.zeros((n, 1), np.float32)},
            "y": y,
            "bad": {},
            "ids": None,
            "groups": None,
            "split_keys": keys // np.uint64(7),
            "content_hashes": keys,
            **more,
        }
    )


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    axis=st.sampled_from(AXES),
    phi_axis=st.sampled_from((1, -1)),
    out_axis=st.sampled_from(AXES),
    task=st.sampled_from(["classification", "regression"]),
    per=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_drawn_pixels_are_those_of_the_maps(
    axis: int | None, phi_axis: int, out_axis: int | None, task: Any, per: int, seed: int
) -> None:
    n, spatial, c = 4, (3, 2), 1 if axis is None else 3
    if task == "regression" and out_axis is None and c > 1:
        return  # three values a pixel need an axis
    layout = Layout(axis, out_axis, spatial, phi_axis)
    z, phi = maps(n, c, spatial, axis, seed), maps(n, 5, spatial, phi_axis, seed + 1)
    rng = np.random.default_rng(seed)
    if task == "classification":
        y = rng.integers(-1, 3, (n, *spatial))
        targets = y.reshape(n, 6)
        known = targets >= 0
    else:
        y = rng.normal(size=(n, *layout.shape(c)))
        y[rng.random(y.shape) < 0.2] = np.nan
        targets = looped(y, None if out_axis is None else out_axis)
        known = np.isfinite(targets).all(2)
    ids, groups = [f"i{i}" for i in range(n)], np.arange(n)
    rows, values, index = sampled(
        rows_of(y, n, ids=ids, groups=groups), {"z": z, "phi": phi}, layout, task, per
    )
    assert len(rows) == n * per and rows.inputs == {} and rows.y is not None
    assert rows.ids is not None and rows.groups is not None
    pz, pp = looped(z, axis), looped(phi, phi_axis)
    for i in range(n):
        blank = not known[i].any()
        for j in range(per):
            r = i * per + j
            assert (r in rows.bad) == blank
            assert rows.ids[r] == f"i{i}" and rows.groups[r] == i
            assert rows.content_hashes[r] == KEYS[i] and rows.split_keys[r] == KEYS[i] // 7
            np.testing.assert_array_equal(values["z"][r], pz[i, index[r]])
            np.testing.assert_array_equal(values["phi"][r], pp[i, index[r]])
            if not blank:
                assert known[i, index[r]]
                np.testing.assert_array_equal(rows.y[r], targets[i, index[r]])


def test_an_image_with_a_fault_is_bad_as_a_whole() -> None:
    layout = Layout(1, 1, (2, 2), 1)
    z, phi = maps(5, 3, (2, 2), 1), maps(5, 4, (2, 2), 1)
    z[1, 2, 0, 1], phi[2, 0, 1, 1] = np.nan, np.inf
    y = np.ones((5, 2, 2), np.int64)
    y[3] = -1
    rows, values, _ = sampled(
        rows_of(y, 5, bad={4: "given"}), {"z": z, "phi": phi}, layout, "classification", 3
    )
    why = {1: "the model's z for it is NaN or Inf", 2: "the model's phi for it is NaN or Inf"}
    why |= {3: "has no labelled pixel", 4: "given"}
    assert rows.bad == {3 * i + j: text for i, text in why.items() for j in range(3)}
    assert rows.y is not None and not rows.y[3:15:1][rows.y[3:15] != 1].any()
    np.testing.assert_array_equal(values["z"].shape, (15, 3))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_images_that_are_all_bad_have_maps_of_any_size(task: Any) -> None:
    layout = Layout(1, 1, (-1, -1), 1)
    y = np.zeros((2, 1, 1), np.int64) if task == "classification" else np.zeros((2, 3, 1, 1))
    rows, values, _ = sampled(
        rows_of(y, 2, bad={0: "is null", 1: "is null"}),
        {"z": maps(2, 3, (4, 5), 1)},
        layout,
        task,
        4,
    )
    assert len(rows.bad) == 8 and rows.y is not None and len(values["z"]) == 8
    assert rows.y.shape == ((8,) if task == "classification" else (8, 3))


@pytest.mark.parametrize(
    ("task", "shape", "found"),
    [
        ("classification", (5, 4), "5×4"),  # as many pixels, but another picture
        ("classification", (2, 2), "2×2"),
        ("regression", (3, 5, 4), "5×4"),
        ("regression", (3, 8, 10), "8×10"),
    ],
)
def test_targets_of_another_size_are_refused(task: Any, shape: tuple[int, ...], found: str) -> None:
    layout = Layout(1, 1, (-1, -1), 1)
    y = np.zeros((2, *shape), np.int64 if task == "classification" else np.float64)
    with pytest.raises(DataError, match=f"maps are {found} and the model's outputs 4×5"):
        sampled(rows_of(y, 2), {"z": maps(2, 3, (4, 5), 1)}, layout, task, 4)


def test_rows_without_labels_are_drawn_from_all_pixels() -> None:
    layout = Layout(-1, -1, (3, 3))
    rows, _, index = sampled(
        rows_of(None, 3), {"z": maps(3, 2, (3, 3), -1)}, layout, "classification", 9
    )
    assert rows.y is None and rows.bad == {}
    np.testing.assert_array_equal(np.sort(index.reshape(3, 9), 1), np.tile(np.arange(9), (3, 1)))
