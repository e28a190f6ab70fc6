"""A pixel scored in a map equals the pixel scored alone, for every registered module and score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from calibration.compile import compile_head, compile_predictor
from calibration.head import Head, Member, Ood
from calibration.threshold import pvalue_table
from posthoc import links, registry
from posthoc.contract import Array, Features, output_fields
from posthoc.pixels import Layout, taken
from posthoc.runtime import open_session
from tests.conformance.cases import CASES, Case, take

IMAGES = 6
# N×C×H×W, N×H×W×C from channels first, N×T×C, and features turned otherwise than outputs.
LAYOUTS = {
    "first": (Layout(1, 1, (3, 5), 1), (3, 5)),
    "turned": (Layout(1, -1, (3, 5), -1), (3, 5)),
    "last": (Layout(-1, -1, (15,), -1), (15,)),
    "labels": (Layout(-1, None, (3, 5), 1), (3, 5)),
}


def maps(rows: Array, axis: int | None, spatial: tuple[int, ...]) -> Array:
    """Rows, image by image, as maps with the channels where ``axis`` says."""
    value = rows.reshape(IMAGES, *spatial, rows.shape[1])
    return np.ascontiguousarray(value if axis == -1 else np.moveaxis(value, -1, 1))


def frozen(rows: Features, layout: Layout) -> bytes:
    """A model that gives the features and outputs that it is given, as maps."""
    assert rows.phi is not None
    spatial: list[Any] = [f"s{i}" for i in range(len(layout.spatial))]

    def shape(width: int, axis: int | None) -> list[Any]:
        return ["N", *spatial, width] if axis == -1 else ["N", width, *spatial]

    sides = {"phi": (rows.phi, layout.phi_axis), "z": (rows.z, layout.axis)}
    infos = {
        k: [
            helper.make_tensor_value_info(f"{k}{tail}", TensorProto.FLOAT, shape(v.shape[1], axis))
            for tail in ("_in", "")
        ]
        for k, (v, axis) in sides.items()
    }
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"{k}_in"], [k]) for k in sides],
        "g",
        [a for a, _ in infos.values()],
        [infos["z"][1]],
    )
    graph.value_info.append(infos["phi"][1])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def head_of(case: Case, rows: Features) -> Head:
    """A head around the page under test, with every field that it can give."""
    state = case.fit(rows)
    module, ood = (case.name, state), None
    if not case.module:
        scores = np.asarray(case.page.score(state, rows.phi, rows.z), np.float32)
        ood = Ood((Member(case.name, state),), *pvalue_table(scores), float(np.median(scores)))
    eps = None
    if case.module and case.task == "classification":
        directions = case.spread(state, take(rows, slice(0, 2))).directions
        eps = None if directions is None else links.normal_draws(len(directions), 0)
    assert rows.phi is not None
    blind = not case.module and "features" not in registry.info(case.name).needs
    factors = np.linspace(-2, 2, 2 * 5).reshape(2, 5)
    return Head(
        task=case.task,
        width=case.width(),
        features=None if blind else rows.phi.shape[1],
        module=module if case.module else None,
        temperature=1.3,
        strength=0.7,
        prediction=case.prediction if case.module else "frozen",
        noise=np.ones(2) if case.task == "regression" else None,
        quantile_factors=factors if case.task == "regression" else None,
        eps=eps,
        q_hat=0.9,
        ood=ood,
        abstain=0.4 if case.task == "classification" else -1.6,
        abstains=True,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pixel_in_a_map_equals_the_pixel_alone(case: Case, layout: str) -> None:
    where, spatial = LAYOUTS[layout]
    if where.out_axis is None and case.task == "regression":
        return  # several values a pixel have an axis
    head = head_of(case, case.rows())
    count = int(np.prod(spatial))
    rows = case.rows(IMAGES * count, seed=7)
    assert rows.phi is not None
    fused = compile_predictor(head, frozen(rows, where), opset=17, phi="phi", z="z", dense=where)
    session, alone = open_session(fused.model), open_session(compile_head(head))
    feed = {
        "phi_in": maps(rows.phi, where.phi_axis, spatial),
        "z_in": maps(rows.z, where.axis, spatial),
    }
    axes = {n: a for n, (_, a) in output_fields(head.task).items()}
    every = np.tile(np.arange(count), (IMAGES, 1))
    flat = {"phi": rows.phi, "z": rows.z}
    flat = {i.name: flat[i.name] for i in alone.get_inputs() if i.name in flat}
    names = [s.name for s in fused.outputs]
    assert {"set", "abstain"} & set(names) and len(names) >= 6
    levels = np.linspace(0.3, 0.95, IMAGES).astype(np.float32)
    shift = {} if head.ood is None else {"ood_threshold": levels - np.float32(0.5)}
    for images in (slice(0, IMAGES), slice(2, 3)):
        some = {k: v[images] for k, v in feed.items()}
        pixels = slice(images.start * count, images.stop * count)
        for given in ({}, {"q_hat": levels} | shift):
            each = {k: v[images].repeat(count) for k, v in given.items()}
            got = session.run(
                [fused.names[n] for n in names], some | {k: v[images] for k, v in given.items()}
            )
            want = alone.run(names, {k: v[pixels] for k, v in flat.items()} | each)
            for name, value, exact in zip(names, got, want, strict=True):
                spec = next(s for s in fused.outputs if s.name == name)
                assert value.shape[1:] == spec.shape[1:] and value.dtype == spec.dtype
                made = taken(value, where, axes[name], every[images])
                if exact.dtype.kind in "bi":
                    np.testing.assert_array_equal(made, exact, err_msg=name)
                else:
                    np.testing.assert_allclose(made, exact, rtol=1e-5, atol=1e-6, err_msg=name)
    # One pixel, and nothing beside it.
    (last,) = session.run([fused.names[names[0]]], feed)
    place = {k: v[-1:] for k, v in flat.items()}
    (single,) = alone.run([names[0]], place)
    np.testing.assert_allclose(
        taken(last, where, axes[names[0]], every)[-1:], single, rtol=1e-5, atol=1e-6
    )
