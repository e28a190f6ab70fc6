"""Torch networks with noise sites in awkward places, and what noise does to them, the slow way."""

import contextlib
import io
import warnings

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional

from posthoc.network.fold import Noise
from posthoc.runtime import open_session

S = 3  # samples


class Root(nn.Module):
    """RMSNorm as it was written before torch had it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        square = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + 1e-6)).type_as(x)


class Images(nn.Module):
    """Each normalisation of feature maps, a residual connection around one, dropped channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.group = nn.GroupNorm(3, 6)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.drop = nn.Dropout2d(0.25)
        self.lines = nn.BatchNorm1d(6)
        self.head = nn.Linear(6 * 8, 3)

    def forward(self, x):
        h = torch.relu(self.batch(self.first(x)))
        h = torch.relu(h + self.group(self.second(h)))
        h = self.drop(h + torch.relu(self.instance(self.third(h))))
        h = functional.max_pool2d(h, 2)
        h = self.lines(h.reshape(h.shape[0], 6, -1))
        return self.head(h.view(h.size(0), -1))


class Volumes(nn.Module):
    """Rows of N×C and of N×C×D×H×W."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 2)
        self.batch = nn.BatchNorm3d(4)
        self.between = nn.Linear(4, 6)
        self.lines = nn.BatchNorm1d(6)
        self.rms = nn.RMSNorm(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.batch(self.first(x))).mean((2, 3, 4))
        h = self.lines(self.between(h))
        return self.head(self.drop(self.rms(h))).squeeze(1)


class Words(nn.Module):
    """A transformer that keeps its rows in axis 1, with a token of its own in front."""

    def __init__(self, first=False):
        super().__init__()
        self.rows_first = first
        self.embed = nn.Embedding(20, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.before = nn.LayerNorm(8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=first)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.after = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        h = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.embed(ids)], 1)
        h = self.before(h)
        padded = functional.pad(ids == 0, (1, 0))
        h = h if self.rows_first else h.transpose(0, 1)
        h = self.body(h, src_key_padding_mask=padded)
        h = self.after(h[:, 0] if self.rows_first else h[0])
        return self.head(self.drop(h))


class Tokens(nn.Module):
    """Scores for every token, with the tokens of all rows in one axis in between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.layer = nn.LayerNorm(8)
        self.flat = Root(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        n, t, _ = x.shape
        h = torch.tanh(self.layer(self.first(x)))
        flat = self.flat(h.reshape(n * t, 8))
        h = h + flat.reshape(n, t, 8) * torch.linspace(0, 1, 8)
        return self.head(self.drop(h))


class Maps(nn.Module):
    """A small U-Net: N×C×H×W of any size, skips that the suffix needs."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.batch = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 6, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.inner = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.mix = nn.Conv2d(8, 5, 3, padding=1)
        self.outer = nn.GroupNorm(1, 5)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        a = torch.relu(self.batch(self.down(x)))
        b = torch.relu(self.inner(self.deep(functional.avg_pool2d(a, 2))))
        h = self.mix(torch.cat([a, self.up(self.drop(b))], 1))
        return self.head(torch.relu(self.outer(h)) + x)


class Windows(nn.Module):
    """Windows of all rows in one axis, as in a Swin transformer, and gates that are products."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.inside = nn.LayerNorm(8)
        self.gated = Root(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        n = x.shape[0]
        h = self.first(x).view(n, 3, 2, 8).reshape(n * 3, 2, 8)
        h = torch.softmax(self.inside(h), 1) * h
        h = h.view(n, 6, 8)
        h = self.gated(torch.sigmoid(h) * h.mean(1, keepdim=True))
        return self.head(h.mean(1))


NETS = {
    "images": (Images, (2, 8, 4)),
    "volumes": (Volumes, (1, 3, 3, 3)),
    "words": (Words, (6,)),
    "words_rows_first": (lambda: Words(True), (6,)),
    "tokens": (Tokens, (4, 5)),
    "maps": (Maps, (1, 8, 6)),
    "windows": (Windows, (6, 4)),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
NORMS += (nn.InstanceNorm2d, nn.RMSNorm, Root)
DROPS = (nn.Dropout, nn.Dropout2d)


def network(name):
    """A network in evaluation mode whose parameters and statistics are all its own."""
    torch.manual_seed(0)
    net = NETS[name][0]().eval()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, NORMS):
                part.weight.uniform_(0.5, 1.5)
                if getattr(part, "bias", None) is not None:
                    part.bias.uniform_(-0.5, 0.5)
                if getattr(part, "running_var", None) is not None:
                    part.running_var.uniform_(0.5, 2)
                    part.running_mean.uniform_(-0.5, 0.5)
    return net


def rows(name, n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = NETS[name][1]
    if name.startswith("words"):
        return torch.randint(1, 20, (n, *shape), generator=rng)
    return torch.randn(n, *shape, generator=rng)


def older(net, x, opset):
    """What torch's older exporter writes, decomposed, with its sizes taken from shapes."""
    file = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (x,), file, dynamo=False, opset_version=opset, input_names=["x"],
            output_names=["y"], dynamic_axes={"x": {0: "n"}},
            training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        )  # fmt: skip
    return file.getvalue()


def newer(net, x, opset, *, optimize=False):
    """What torch's exporter writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = torch.onnx.export(
            net, (x,), dynamo=True, opset_version=opset, input_names=["x"], output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False, optimize=optimize,
        )  # fmt: skip
    return done.model_proto.SerializeToString()


def parts(net, kinds):
    """The modules of these kinds in the order in which they run."""
    order, hooks = [], []
    for part in net.modules():
        if isinstance(part, kinds):
            hooks.append(part.register_forward_hook(lambda m, *_: order.append(m)))
    name = next(k for k, (make, _) in NETS.items() if isinstance(net, type(make())))
    with torch.no_grad():
        net(rows(name, 2))
    for hook in hooks:
        hook.remove()
    return order


def slowly(net, x, noises):
    """S×N×… outputs, one sample at a time: ``noises`` are (module, batch axis, gain, offset)."""
    samples = next(len(a) for *_, g, c in noises for a in (g, c) if a is not None)
    out = []
    for s in range(samples):
        hooks = []
        for part, batch, gain, offset in noises:
            g, c = _at(gain, s, batch, 1), _at(offset, s, batch, 0)
            hooks.append(part.register_forward_hook(lambda _m, _i, h, g=g, c=c: h * g + c))
        with torch.no_grad():
            out.append(net(x).numpy())
        for hook in hooks:
            hook.remove()
    return np.stack(out)


def _at(values, s, batch, default):
    """What sample s has, to broadcast over the axis of the rows."""
    if values is None:
        return default
    return torch.from_numpy(np.expand_dims(values[s], batch)).float()


def outputs(model):
    return [o.name for o in onnx.load_from_string(model).graph.output]


def run(model, names, feed):
    return open_session(model).run(names, feed)


def noisy(sites, seed=0):
    """Noise of the kind that each site gets: masks at dropouts, a scale and shift elsewhere."""
    rng, noises = np.random.default_rng(seed), {}
    for site in sites:
        shape = site.shape
        if site.kind == "dropout" and not site.whole and -1 not in shape:
            noises[site.tensor] = Noise((rng.random((S, *shape)) > 0.3) / 0.7)
            continue
        scale, shift = rng.normal(size=(2, S, site.channels)) * 0.3
        noises[site.tensor] = Noise(site.along(1 + scale), site.along(shift))
    return noises
