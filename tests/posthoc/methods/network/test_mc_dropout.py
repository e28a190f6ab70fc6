"""MC-dropout against the torch network with the same masks, one sample at a time."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from posthoc import registry
from posthoc.contract import FitError, ModelError
from posthoc.frozen import open_frozen
from posthoc.links import softmax
from posthoc.network.attach import NetworkRows
from tests.posthoc.methods.network import nets

RANDOM = {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


def thinned(kind: str, masks: list[np.ndarray], given: Any, places: Any = nets.DROPOUTS) -> Any:
    """S×N×C: the torch network with each mask on its dropout, one sample after the other."""
    net = nets.network(kind)
    where = nets.parts(net, places)
    out = []
    for s in range(len(masks[0])):
        with nets.hooked(where, [lambda h, m=m[s]: h * torch.as_tensor(m) for m in masks]):
            out.append(nets.run(net, given))
    return np.stack(out)


def gains(made: nets.Made) -> list[np.ndarray]:
    assert all(n.offset is None for n in made.noises.values())
    return [n.terms()["gain"] for n in made.noises.values()]


@pytest.mark.parametrize("kind", ["images", "table", "single", "pair", "values", "maps"])
def test_copies_are_the_network_with_those_masks(kind: str) -> None:
    task = "regression" if kind == "values" else "classification"
    made = nets.attach("mc_dropout", nets.frozen(kind, "dropout"), nets.rows(kind, 60), task)
    given = nets.inputs(kind, 7, seed=2)
    masks = gains(made)
    want = thinned(kind, masks, given)
    got = made.members(given)
    assert got.shape == want.shape and len(want) == 20
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert np.median(want.std(0)) > 1e-2  # the copies differ
    z, _ = nets.both(made.frozen, given)
    np.testing.assert_allclose(z, nets.run(nets.network(kind), given), atol=1e-5 * np.abs(z).max())
    # Each dropout has its own rate; as pS is whole here, what is kept is divided by 1 - p.
    rates = [p.p for p in nets.parts(nets.network(kind), nets.DROPOUTS)]
    assert made.attached.facts["rates"] == pytest.approx(rates)
    for mask, p in zip(masks, rates, strict=True):
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - p))}
        # Stratified: each unit is dropped in pS of the samples, rounded up or down.
        assert (np.abs((mask == 0).sum(0) - 20 * p) < 1).all()


@pytest.mark.parametrize("rate", [0.03, 0.17, 0.33, 0.85])
def test_masks_average_to_one_in_every_unit(rate: float) -> None:
    given = nets.rows("images", 20)
    made = nets.attach("mc_dropout", nets.frozen("images", "dropout"), given, rate=rate, samples=7)
    for mask in gains(made):
        np.testing.assert_allclose(mask.mean(0), 1, atol=1e-6)
        dropped = (mask == 0).sum(0)
        assert (np.abs(dropped - 7 * rate) < 1).all()
        want = np.broadcast_to(7 / (7 - dropped), mask.shape)
        np.testing.assert_allclose(mask[mask > 0], want[mask > 0], rtol=1e-6)
    assert sum((m == 0).sum() for m in gains(made)) == pytest.approx(7 * 14 * rate, rel=0.5)


def test_dropout2d_drops_channels_whole() -> None:
    made = nets.attach("mc_dropout", nets.frozen("images", "dropout"), nets.rows("images", 20))
    whole, single = gains(made)
    assert whole.shape == (20, 6, 1, 1) and single.shape == (20, 8)


def test_no_random_operator_and_frozen_outputs_keep_every_bit() -> None:
    model = nets.frozen("images", "dropout")
    made = nets.attach("mc_dropout", model, nets.rows("images", 20))
    proto = onnx.load_from_string(made.frozen.model)
    assert not RANDOM & {n.op_type for n in proto.graph.node}
    assert [o.name for o in proto.graph.output] == [o.name for o in model.outputs]
    given = nets.inputs("images", 8)
    once, again = nets.both(made.frozen, given), nets.both(made.frozen, given)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(once, again, strict=True))
    z = nets.open_session(nets.with_outputs(onnx.load_from_string(model.model), [model.z])).run(
        [model.z], given
    )[0]
    np.testing.assert_array_equal(once[0], z)


def test_the_seed_makes_the_masks() -> None:
    model, given = nets.frozen("table", "dropout"), nets.rows("table", 20)

    def sha(**settings: Any) -> str:
        made = nets.attach("mc_dropout", model, given, **settings)
        return hashlib.sha256(made.frozen.model).hexdigest()

    assert sha() == sha(seed=0) != sha(seed=1)


def test_masks_do_not_depend_on_labels_or_their_absence() -> None:
    model, given = nets.frozen("plain", None), nets.rows("plain", 200)
    at = named(model, "Relu")
    want = nets.attach("mc_dropout", model, given, at=at, epsilon=0.02)
    for y in (None, np.zeros(200, np.int64)):
        other = NetworkRows(given.inputs, y)
        got = nets.attach("mc_dropout", model, other, at=at, epsilon=0.02)
        assert got.frozen.model == want.frozen.model


def named(model: Any, kind: str) -> str:
    return str(
        next(n for n in onnx.load_from_string(model.model).graph.node if n.op_type == kind).output[
            0
        ]
    )


def test_the_rate_at_named_tensors_is_the_largest_within_epsilon() -> None:
    model, given = nets.frozen("plain", None), nets.rows("plain", 300)
    made = nets.attach("mc_dropout", model, given, at=named(model, "Relu"), samples=16)
    facts = made.attached.facts
    [rate] = facts["rates"]
    assert facts["epsilon"] == 0.01 and facts["uncalibrated"] is True
    assert facts["samples"] == 16 and facts["seed"] == 0 and facts["judges"] == 300
    assert "rate_unlimited" not in facts

    def moved(model: nets.Made) -> tuple[float, float]:
        """By a loop over rows and samples."""
        [mask] = gains(model)
        net, x = nets.network("plain"), given.inputs["x"]
        variation = flips = 0.0
        with torch.no_grad():
            for row in torch.as_tensor(x):
                h = torch.relu(net.first(row))
                p = softmax(net.head(h).numpy().astype(np.float64))
                q = np.mean(
                    [softmax(net.head(h * torch.as_tensor(m)).numpy()) for m in mask], axis=0
                )
                variation += 0.5 * np.abs(p - q).sum() / len(x)
                flips += (p.argmax() != q.argmax()) / len(x)
        return variation, flips

    variation, flips = moved(made)
    assert facts["total_variation"] == pytest.approx(variation, abs=1e-6)
    assert facts["flips"] == pytest.approx(flips)
    assert 0.0 < max(variation, flips) <= 0.01
    more = nets.attach(
        "mc_dropout", model, given, at=named(model, "Relu"), samples=16, rate=rate * 1.02
    )
    assert max(moved(more)) > 0.01  # no room left
    wide = nets.attach("mc_dropout", model, given, at=named(model, "Relu"), epsilon=0.05)
    assert wide.attached.facts["rates"][0] > rate


def test_the_rate_of_a_regression_is_by_the_spread_over_all_rows() -> None:
    # More samples than a block has rows: a block of one row has no spread of its own.
    model, given = nets.frozen("values", None), nets.rows("values", 60)
    at = named(model, "Tanh")
    for samples in (20, 300):
        made = nets.attach(
            "mc_dropout", model, given, "regression", at=at, samples=samples, epsilon=0.1
        )
        [mask] = gains(made)
        net, x = nets.network("values"), torch.as_tensor(given.inputs["x"])
        with torch.no_grad():
            z = net(x).numpy()
            h = torch.tanh(net.layer(net.first(x)))
            each = [
                net.head(torch.tanh(net.lines(net.second(h * torch.as_tensor(m))))).numpy()
                for m in mask
            ]
        rms = np.sqrt(np.mean([(m - z) ** 2 for m in each], axis=0))
        relative = float((rms / z.std(0)).mean())
        assert made.attached.facts["relative_std"] == pytest.approx(relative, rel=1e-4)
        assert 0.09 < relative <= 0.1


@pytest.mark.parametrize(("kind", "epsilon"), [("maps", 0.03), ("single", 0.002)])
def test_the_rate_over_pixels_and_for_one_logit(kind: str, epsilon: float) -> None:
    model, given = nets.frozen(kind, None), nets.rows(kind, 30)
    at = named(model, "Relu" if kind == "maps" else "Tanh")
    made = nets.attach("mc_dropout", model, given, at=at, samples=6, epsilon=epsilon)
    net, x = nets.network(kind), torch.as_tensor(given.inputs["x"])
    [mask] = map(torch.as_tensor, gains(made))
    with torch.no_grad():
        if kind == "maps":
            h = torch.relu(net.batch(net.first(x)))
            z, each = net.head(h), [net.head(h * m) for m in mask]
        else:
            h = torch.tanh(net.layer(net.first(x)))
            z, *each = (net.head(torch.tanh(net.lines(net.second(h * m)))) for m in [1.0, *mask])
            z, *each = (torch.cat([torch.zeros_like(v), v], 1) for v in (z, *each))
        p, q = z.softmax(1), torch.stack([v.softmax(1) for v in each]).mean(0)
    facts = made.attached.facts
    variation = float(0.5 * (p - q).abs().sum(1).mean())
    assert facts["total_variation"] == pytest.approx(variation, rel=1e-4)
    assert facts["flips"] == pytest.approx(float((p.argmax(1) != q.argmax(1)).double().mean()))
    assert 0.6 * epsilon < max(facts["total_variation"], facts["flips"]) <= epsilon


def test_a_network_that_bears_any_rate_says_so() -> None:
    model, given = nets.frozen("plain", None), nets.rows("plain", 40)
    made = nets.attach("mc_dropout", model, given, at=named(model, "Relu"), epsilon=0.9)
    assert made.attached.facts["rate_unlimited"] is True
    assert made.attached.facts["rates"] == [0.9]


def test_several_named_tensors_have_one_rate() -> None:
    model, given = nets.frozen("images", None), nets.rows("images", 40)
    proto = onnx.load_from_string(model.model)
    first, second = [n.output[0] for n in proto.graph.node if n.op_type == "Relu"]
    # The exporter folds the normalisation; a channel of the first map is dropped whole.
    made = nets.attach(
        "mc_dropout", model, given, at=f" {first},{second},{first}", rate=0.2, channels="true"
    )
    masks = gains(made)
    assert [m.shape for m in masks] == [(20, 6, 1, 1), (20, 8, 1, 1)]
    assert made.attached.facts["rates"] == [0.2, 0.2] and made.attached.facts["channels"] is True
    x = nets.inputs("images", 5, seed=3)
    net, out = nets.network("images"), []
    with torch.no_grad():
        for a, b in zip(*(map(torch.as_tensor, m) for m in masks), strict=True):
            h = torch.relu(net.batch(net.first(torch.as_tensor(x["x"])))) * a
            h = torch.relu(net.inner(net.second(torch.nn.functional.max_pool2d(h, 2)))) * b
            out.append(net.head(h.mean((2, 3))).numpy())
    np.testing.assert_allclose(made.members(x), out, atol=1e-4)
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        nets.attach("mc_dropout", model, given, at="nowhere")


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_dropouts_of_an_onnx_file(opset: int) -> None:
    given = nets.rows("pair", 30)
    file = nets.older("pair", opset, training=True)
    assert "Dropout" in {n.op_type for n in onnx.load_from_string(file).graph.node}
    model = open_frozen(file, task="classification", sample=given.inputs)
    made = nets.attach("mc_dropout", model, given)
    assert made.attached.facts["rates"] == pytest.approx([0.5])
    x = nets.inputs("pair", 6, seed=5)
    np.testing.assert_allclose(made.members(x), thinned("pair", gains(made), x), atol=1e-4)


def onnx_dropout(ratio: float | None, training: bool | None, opset: int = 17) -> bytes:
    """x → Linear → Dropout → Linear → softmax; as 12 leaves it, ratio and mode as inputs."""
    rng = np.random.default_rng(0)
    stored = {
        "w": rng.normal(size=(5, 6)).astype("f4"),
        "v": rng.normal(size=(6, 3)).astype("f4"),
        "ratio": np.float32(0 if ratio is None else ratio),
        "mode": np.asarray(bool(training)),
    }
    names = ["h", "" if ratio is None else "ratio", "" if training is None else "mode"]
    while not names[-1]:
        names.pop()
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Dropout", names, ["d"], name="drop"),
            helper.make_node("MatMul", ["d", "v"], ["z"]),
            helper.make_node("Softmax", ["z"], ["p"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 5])],
        [helper.make_tensor_value_info("p", 1, ["n", 3])],
        [numpy_helper.from_array(v, k) for k, v in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("ratio", "training"), [(0.25, None), (None, None), (0.25, False), (0.25, True)]
)
def test_a_graph_that_ends_in_a_softmax(ratio: float | None, training: bool | None) -> None:
    model = open_frozen(onnx_dropout(ratio, training), task="classification")
    given = nets.rows("table", 20)
    made = nets.attach("mc_dropout", model, given)
    rate = 0.5 if ratio is None else ratio
    assert made.attached.facts["rates"] == [rate] and made.attached.facts["sites"] == ["drop"]
    weights = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load_from_string(model.model).graph.initializer
    }
    x = given.inputs["x"]
    [mask] = gains(made)
    want = np.stack([(x @ weights["w"] * m) @ weights["v"] for m in mask])
    np.testing.assert_allclose(made.members({"x": x}), want, atol=1e-5)


def free_maps() -> Any:
    """A dropout on maps of any size."""
    rng = np.random.default_rng(0)
    stored = {"w": rng.normal(size=(4, 1, 3, 3)).astype("f4"), "v": np.ones((4, 2), np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["h"]),
            helper.make_node("Dropout", ["h"], ["d"], name="drop"),
            helper.make_node("GlobalAveragePool", ["d"], ["m"]),
            helper.make_node("Flatten", ["m"], ["f"]),
            helper.make_node("MatMul", ["f", "v"], ["z"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("z", 1, ["n", 2])],
        [numpy_helper.from_array(v, k) for k, v in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return open_frozen(model.SerializeToString(), task="classification")


def test_maps_of_any_size_are_dropped_by_channel_only() -> None:
    model, given = free_maps(), NetworkRows(nets.inputs("images", 10), None)
    with pytest.raises(ModelError, match=r"maps of any size.*channels=true"):
        nets.attach("mc_dropout", model, given)
    made = nets.attach("mc_dropout", model, given, channels=True)
    assert gains(made)[0].shape == (20, 4, 1, 1)
    smaller = {"x": given.inputs["x"][:, :, :7, :9]}
    assert made.members(smaller).shape == (20, 10, 2)


def test_what_cannot_be_done_is_said() -> None:
    plain, given = nets.frozen("plain", None), nets.rows("plain", 40)
    with pytest.raises(ModelError, match=r"no dropout.*module:factory.*at=NAME.*head_dropout"):
        nets.attach("mc_dropout", plain, given)
    with pytest.raises(FitError, match="no unit is dropped in any of 2 samples"):
        nets.attach("mc_dropout", plain, given, at=named(plain, "Relu"), samples=2, rate=1e-7)
    with pytest.raises(FitError, match="dropped in all of 2 samples; give a smaller rate"):
        nets.attach("mc_dropout", plain, given, at=named(plain, "Relu"), samples=2, rate=0.9)
    with pytest.raises(ModelError, match=r"above the limit.*take fewer samples"):
        nets.attach("mc_dropout", plain, given, at=named(plain, "Relu"), samples=10**8, rate=0.1)
    for settings, words in (
        ({"rate": 1.0}, "less than 1"),
        ({"samples": 1}, "greater than or equal to 2"),
        ({"at": "a", "rate": 0.1, "epsilon": 0.1}, "the rate is given"),
        ({"epsilon": 0.1}, "at named tensors"),
        ({"rates": 0.1}, "has no setting 'rates'; it has at, channels, epsilon"),
    ):
        with pytest.raises(FitError, match=words):
            registry.settings("mc_dropout", settings)


def test_what_the_export_keeps() -> None:
    page = registry.page("mc_dropout")
    assert page.keep(page.Settings()) == "dropout"
    assert page.keep(page.Settings(at="a")) is None  # names are those of the plain export
