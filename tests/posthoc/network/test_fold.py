"""Samples in the batch axis against a slow loop in torch, one sample at a time through hooks."""

from importlib.metadata import files

import numpy as np
import onnx
import pytest
import torch
from onnx.utils import Extractor

from posthoc.export import export_torch
from posthoc.network.fold import believe, sampled, separate
from posthoc.network.sites import find_dropouts, find_normalisations
from tests.posthoc.network.nets import (
    DROPS,
    NETS,
    NORMS,
    S,
    network,
    newer,
    noisy,
    older,
    outputs,
    parts,
    rows,
    run,
    slowly,
)

HOWS = {
    "normalisations kept": lambda net, x: kept(net, x, "normalisation"),
    "dropouts kept": lambda net, x: kept(net, x, "dropout"),
    "not optimised": lambda net, x: newer(net, x, 20),
    "opset 23": lambda net, x: newer(net, x, 23),
    "older, opset 13": lambda net, x: older(net, x, 13),
    "older, opset 17": lambda net, x: older(net, x, 17),
}
CASES = [(name, "dropouts kept") for name in NETS if name != "windows"]  # which has none
CASES += [("windows", "normalisations kept"), ("words", "not optimised"), ("maps", "opset 23")]
CASES += [(name, "older, opset 13") for name in ("images", "tokens", "windows")]
CASES += [("words", "older, opset 17")]


def kept(net, x, what):
    return export_torch(net, (x,), input_names=["x"], keep=what).model


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_sample_is_the_network_with_its_noise(name, how):
    net = network(name)
    model = HOWS[how](net, rows(name, 3))
    sites, modules = find_normalisations(model), parts(net, NORMS)
    if how == "dropouts kept":
        sites, modules = [*sites, *find_dropouts(model)], [*modules, *parts(net, DROPS)]
    assert len(sites) == len(modules) > 0
    noises, axis, [out] = noisy(sites), {"tokens": 2}.get(name, 1), outputs(model)
    after = sampled(model, out, noises, "members", axis=axis)
    slow = [
        (module, site.batch, noises[site.tensor].gain, noises[site.tensor].offset)
        for site, module in zip(sites, modules, strict=True)
    ]
    for n in (1, 5):
        x = rows(name, n, seed=n)
        feed = {"x": x.numpy()}
        frozen, members = run(after, [out, "members"], feed)
        assert np.array_equal(frozen, run(model, [out], feed)[0])
        want = slowly(net, x, slow)
        got = separate(members, S, axis).reshape(want.shape)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
        assert members.shape[axis] == S * (want.shape[1 + axis] if want.ndim > 2 else 1)
    worst = believe(model, after, feed, output=out, members="members", noises=noises, axis=axis)
    assert worst < 1e-5


def test_sizes_that_were_free_stay_free():
    net = network("maps")
    x = rows("maps", 2)
    dims = {0: torch.export.Dim("n"), 2: 2 * torch.export.Dim("h"), 3: 2 * torch.export.Dim("w")}
    program = torch.export.export(net, (x,), dynamic_shapes=(dims,))
    model = export_torch(program, (x,), input_names=["x"], keep="normalisation").model
    sites = find_normalisations(model, {"x": x.numpy()})
    assert [s.shape for s in sites] == [(4, -1, -1), (6, -1, -1), (5, -1, -1)]
    noises, [out] = noisy(sites), outputs(model)
    after = sampled(model, out, noises, "members", rows={"x": x.numpy()})
    x = torch.randn(3, 1, 12, 10)
    slow = [
        (m, 0, v.gain, v.offset) for m, v in zip(parts(net, NORMS), noises.values(), strict=True)
    ]
    [members] = run(after, ["members"], {"x": x.numpy()})
    np.testing.assert_allclose(separate(members, S), slowly(net, x, slow), atol=2e-5)


def test_masks_can_be_fed_instead_of_stored():
    net = network("maps")
    model, x = kept(net, rows("maps", 3), "dropout"), rows("maps", 4, seed=1).numpy()
    [site], [out] = find_dropouts(model), outputs(model)
    one, two = ({site.tensor: noisy([site], seed)[site.tensor]} for seed in (0, 1))
    fed = sampled(model, out, one, "m", inputs=True)
    for noise in (one, two):
        stored = run(sampled(model, out, noise, "m"), ["m"], {"x": x})[0]
        gain = noise[site.tensor].gain.astype(np.float32)
        assert np.array_equal(run(fed, ["m"], {"x": x, f"{site.tensor}/gain": gain})[0], stored)
    assert believe(model, fed, {"x": x}, output=out, members="m", noises=one) < 1e-5


class Residual(torch.nn.Module):
    """Convolutions whose sums a host adds into the convolution, while nobody else reads them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(16) for _ in range(4))
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        for i in (0, 2):
            h = torch.relu(self.norms[i](self.layers[i](x)))
            x = torch.relu(x + self.norms[i + 1](self.layers[i + 1](h)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [1, 3], [0, 1, 2, 3]])
def test_frozen_outputs_keep_every_bit_where_noise_enters_a_fused_sum(chosen):
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(8, 16, 12, 12)
    for norm in net.norms:
        norm.running_var.uniform_(0.5, 2)
    model = kept(net, x, "normalisation")
    sites = [find_normalisations(model)[i] for i in chosen]
    noises, [out] = noisy(sites), outputs(model)
    frozen, members = run(sampled(model, out, noises, "m"), [out, "m"], {"x": x.numpy()})
    assert np.array_equal(frozen, run(model, [out], {"x": x.numpy()})[0])
    slow = [
        (net.norms[i], 0, v.gain, v.offset) for i, v in zip(chosen, noises.values(), strict=True)
    ]
    np.testing.assert_allclose(separate(members, S), slowly(net, x, slow), atol=1e-5)


def test_the_prefix_is_computed_once_and_nothing_is_repeated_that_broadcasts():
    torch.manual_seed(0)
    body = [torch.nn.Linear(6, 6), torch.nn.Tanh()] * 3
    net = torch.nn.Sequential(*body, torch.nn.Dropout(0.5), torch.nn.Linear(6, 2)).eval()
    model = kept(net, torch.randn(3, 6), "dropout")
    [site], [out] = find_dropouts(model), outputs(model)
    after = onnx.load_from_string(sampled(model, out, noisy([site]), "m"))
    kinds = [node.op_type for node in after.graph.node]
    assert kinds.count("Gemm") == 3 + 2 and kinds.count("Tanh") == 3
    assert "Tile" not in kinds and "Expand" not in kinds


def test_magika_with_noise_at_its_normalisations():
    """Against its own graph cut in three, run once a sample."""
    [path] = [f for f in files("magika") if f.match("*/standard_v3_3/model.onnx")]
    model = path.locate().read_bytes()
    sites, [out] = find_normalisations(model), outputs(model)
    first, second = (s.tensor for s in sites)
    noises = noisy(sites)
    x = np.random.default_rng(0).integers(0, 257, (4, 2048)).astype(np.int32)
    after = sampled(model, out, noises, "members")
    frozen, members = run(after, [out, "members"], {"bytes": x})
    assert np.array_equal(frozen, run(model, [out], {"bytes": x})[0])
    proto = onnx.load_from_string(model)
    for name in (first, second):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        proto.graph.value_info.append(value)
    cut = Extractor(proto)
    middle = cut.extract_model(["bytes", first], [second]).SerializeToString()
    end = cut.extract_model(["bytes", second], [out]).SerializeToString()
    [h] = run(cut.extract_model(["bytes"], [first]).SerializeToString(), None, {"bytes": x})
    for s, got in enumerate(separate(members, S)):
        one, two = (
            (noises[t].gain[s].astype(np.float32), noises[t].offset[s].astype(np.float32))
            for t in (first, second)
        )
        [deep] = run(middle, None, {"bytes": x, first: h * one[0] + one[1]})
        [want] = run(end, None, {"bytes": x, second: deep * two[0] + two[1]})
        np.testing.assert_allclose(got, want, atol=1e-5)
