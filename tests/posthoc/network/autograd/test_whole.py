"""Whole graphs against ONNX Runtime: exports of torch modules, and classifiers of others."""

import io
import re
import warnings
from functools import cache
from importlib.metadata import files
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, version_converter
from torch import nn

from bench.assets import mnist, mnist_input, mnistnet
from posthoc.model.quiet import quiet
from posthoc.network.autograd import Network, unsupported
from tests.posthoc.network.autograd.graphs import assert_same, tensors


class Norms(nn.Module):
    """A residual network with every normalisation; ``rms`` is unknown to torch's old exporter."""

    def __init__(self, rms=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.batch, self.group = nn.BatchNorm2d(8), nn.GroupNorm(4, 8)
        self.instance, self.layer = nn.InstanceNorm2d(8, affine=True), nn.LayerNorm([8, 8, 8])
        self.middle = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.last = nn.RMSNorm(8) if rms else nn.LayerNorm(8)
        self.flat, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)
        for p in self.parameters():
            nn.init.uniform_(p, -0.6, 0.9)
        for b in (self.batch, self.flat):
            nn.init.uniform_(b.running_mean, -1, 1)
            nn.init.uniform_(b.running_var, 0.5, 2)

    def forward(self, x):
        h = nn.functional.max_pool2d(torch.relu(self.batch(self.stem(x))), 3, 1, 1)
        h = h + nn.functional.silu(self.group(self.middle(h)))
        h = self.layer(nn.functional.hardswish(self.instance(h)))
        h = self.last(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))
        return self.head(self.drop(self.flat(h)))


class Block(nn.Module):
    """A transformer block over tokens, with a class token and a mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(40, 16)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Embedding(20, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        h = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.embed(ids)], 1)
        n, t, width = h.shape
        h = h + self.position(torch.arange(t))
        split = self.qkv(self.first(h)).reshape(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = torch.nn.functional.pad(ids > 3, (1, 0), value=True)[:, None, None, :]
        a = nn.functional.scaled_dot_product_attention(*split.unbind(0), attn_mask=mask)
        h = h + self.out(a.transpose(1, 2).reshape(n, t, width))
        return self.head((h + self.mlp(self.second(h)))[:, 0])


class UNet(nn.Module):
    """Down twice, up once by a transposed convolution and once by resizing, with skips."""

    def __init__(self, mode="bilinear"):
        super().__init__()
        torch.manual_seed(2)
        self.mode = mode
        self.a, self.b, self.c = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 4), (4, 8), (8, 8))
        )
        self.norm, self.up = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.slope = nn.PReLU(4)
        self.d, self.e = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        f = nn.functional
        x = f.pad(x, (1, 1, 1, 1), mode="reflect")
        a = self.slope(self.a(x))
        b = f.leaky_relu(self.norm(self.b(f.max_pool2d(a, 2))), 0.2)
        c = torch.tanh(self.c(f.avg_pool2d(b, 2)))
        d = f.elu(self.d(torch.cat([self.up(c), b], 1)))
        corners = {} if self.mode == "nearest" else {"align_corners": self.mode == "bicubic"}
        d = f.interpolate(d, scale_factor=2.0, mode=self.mode, **corners)
        return torch.softmax(self.head(f.softplus(self.e(torch.cat([d, a], 1)))), 1)


def old_export(module, x, opset):
    """By TorchScript, normalisation layers left as they are."""
    file = io.BytesIO()
    with quiet("torch.onnx"):
        torch.onnx.export(
            module.eval(),
            (x,),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    return onnx.load_from_string(file.getvalue())


@cache
def new_export(kind, opset):
    """By torch.export."""
    module, x = (Norms(rms=True), IMAGES) if kind == "norms" else (Block(), IDS)
    with quiet("torch.onnx"):
        shapes = ({0: torch.export.Dim("n")},)
        program = torch.onnx.export(
            module.eval(),
            (x,),
            dynamo=True,
            opset_version=opset,
            input_names=["x"],
            dynamic_shapes=shapes,
            optimize=False,
        )
    return program.model_proto


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
MASKS = torch.randn(2, 1, 14, 18, generator=torch.Generator().manual_seed(0))


def kinds(model):
    return {n.op_type for n in model.graph.node}


@pytest.mark.parametrize("opset", [13, 17])
def test_old_exports_of_normalisations(opset):
    model = old_export(Norms(), IMAGES, opset)
    assert {"BatchNormalization", "InstanceNormalization"} <= kinds(model)
    assert_same(model, {"x": IMAGES[:2].numpy()})


@pytest.mark.parametrize(("opset", "mode"), [(13, "nearest"), (17, "bilinear"), (13, "bicubic")])
def test_old_exports_of_a_u_net(opset, mode):
    model = old_export(UNet(mode), MASKS, opset)
    assert {"ConvTranspose", "Resize"} <= kinds(model)
    assert_same(model, {"x": MASKS.numpy()})


@pytest.mark.parametrize("opset", [14, 17])
def test_old_exports_of_a_transformer_block(opset):
    assert_same(old_export(Block(), IDS, opset), {"x": IDS[:2].numpy()})


def test_new_export_of_normalisations():
    model = new_export("norms", 23)
    found = kinds(model) | {n.op_type for f in model.functions for n in f.node}
    assert {"GroupNormalization", "RMSNormalization", "LayerNormalization"} <= found
    module = Norms(rms=True).eval()
    with torch.no_grad():
        want = module(IMAGES).numpy()
    [output] = [o.name for o in model.graph.output]
    got = Network(model, [output])({"x": IMAGES})[output].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert_same(model, {"x": IMAGES[:2].numpy()})


@pytest.mark.parametrize("opset", [18, 23])
def test_new_export_of_a_transformer_block(opset):
    """Against torch: ONNX Runtime's CPU kernel of Attention refuses this mask at opset 23."""
    model = new_export("block", opset)
    assert ("Attention" in kinds(model)) == (opset == 23)
    [output] = [o.name for o in model.graph.output]
    with torch.no_grad():
        want = Block().eval()(IDS[:2]).numpy()
    got = Network(model, [output])({"x": IDS[:2]})[output].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["norms", "block", "u-net", "new block"])
def test_shapes_wait_for_no_device(kind):
    """On a device whose values cannot be read (meta): numbers stay in main memory, and no
    operator mixes devices."""
    model, x = {
        "norms": lambda: (old_export(Norms(), IMAGES, 17), IMAGES),
        "block": lambda: (old_export(Block(), IDS, 17), IDS),
        "u-net": lambda: (old_export(UNet(), MASKS, 17), MASKS),
        "new block": lambda: (new_export("block", 18), IDS),
    }[kind]()
    [output] = [o.name for o in model.graph.output]
    want = Network(model, [output])({"x": x})[output]
    got = Network(model, [output], device="meta")({"x": x})[output]
    assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype)


def test_gradients_are_those_of_the_module():
    """With respect to the images, and to a parameter by way of a hook."""
    module = Norms().eval()
    model = old_export(module, IMAGES, 17)
    [output] = [o.name for o in model.graph.output]
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    scale = torch.ones(8, requires_grad=True)
    out = Network(model, [output])({"x": x}, {"batch.weight": lambda w: w * scale})[output]
    out[:, 1].sum().backward()
    module(y)[:, 1].sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    weight = module.batch.weight
    torch.testing.assert_close(scale.grad, weight.grad * weight.detach(), rtol=1e-4, atol=1e-6)


def test_magika():
    """A deployed classifier of files: embedding of bytes, decomposed softmax."""
    [path] = [f for f in files("magika") if f.match("*/standard_v3_3/model.onnx")]
    x = np.random.default_rng(0).integers(0, 257, (3, 2048)).astype(np.int32)
    assert_same(onnx.load(path.locate()), {"bytes": x})


def test_mnistnet():
    model = old_export(mnistnet(), torch.zeros(2, 1, 28, 28), 17)
    assert_same(model, {"x": mnist_input(mnist()[0][:8])})


def converted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return version_converter.convert_version(onnx.load(path), 17)


@pytest.mark.parametrize("kind", ["pytorch-operator", "pytorch-converted"])
def test_what_torch_answered(kind):
    """The ONNX project's recordings: small modules and what torch made of their inputs."""
    root = Path(onnx.__file__).parent / "backend/test/data" / kind
    ran = 0
    for folder in sorted(root.iterdir()):
        if re.search(r"PReLU_\dd_multiparam", folder.name):
            continue  # slopes per channel, which opset 6 broadcast from the front
        model = converted(folder / "model.onnx")
        outputs = [o.name for o in model.graph.output]
        assert unsupported(model, outputs) == []
        stored = {t.name for t in model.graph.initializer}
        names = [i.name for i in model.graph.input if i.name not in stored]
        given = [read(folder, "input", i) for i in range(len(names))]
        got = Network(model, outputs)(tensors(dict(zip(names, given, strict=True))))
        for i, name in enumerate(outputs):
            want = read(folder, "output", i)
            assert got[name].shape == want.shape
            np.testing.assert_allclose(got[name].numpy(), want, rtol=1e-4, atol=1e-5)
        ran += 1
    assert ran > 30


def read(folder, kind, i):
    return numpy_helper.to_array(onnx.load_tensor(folder / "test_data_set_0" / f"{kind}_{i}.pb"))


CLASSIC = ("densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet")


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSIC)
def test_classic_classifiers(name):
    """At their real size, with weights drawn for the test (the files hold one number for all)."""
    root = Path(onnx.__file__).parent / "backend/test/data/light"
    model, rng = converted(root / f"light_{name}.onnx"), np.random.default_rng(0)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for made in [n for n in model.graph.node if n.op_type == "ConstantOfShape"]:
        shape = values[made.input[0]]
        spread = np.prod(shape[1:]) ** -0.5
        drawn = rng.normal(size=shape) * spread if len(shape) > 1 else rng.uniform(0.5, 2, shape)
        model.graph.node.remove(made)
        value = numpy_helper.from_array(drawn.astype(np.float32), made.output[0])
        model.graph.initializer.append(value)
    stored = {t.name for t in model.graph.initializer}
    shapes = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in model.graph.input
        if i.name not in stored
    }
    assert_same(model, {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()})
