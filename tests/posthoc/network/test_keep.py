"""What stays a node in the exports of real torch modules, and that they are still the modules."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

from posthoc.contract import ModelError
from posthoc.export import export_torch
from posthoc.network.sites import find_dropouts, find_normalisations
from posthoc.runtime import open_session


class Blocks(nn.Module):
    """Normalisations behind everything that takes them in, and unusual settings of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-2, momentum=0.3)
        self.c, self.d = nn.ConvTranspose2d(4, 3, 2), nn.BatchNorm2d(3)
        self.e, self.f = nn.Linear(3, 5), nn.BatchNorm1d(5, affine=False)
        for norm in (self.b, self.d, self.f):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = self.d(self.c(torch.relu(self.b(self.a(x)))))
        return self.f(self.e(h.mean((2, 3))))


def nodes(model, kind):
    return [n for n in onnx.load_from_string(model).graph.node if n.op_type == kind]


def attributes(node):
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def test_normalisations_stay_with_statistics_eps_and_momentum():
    net, x = Blocks(), torch.randn(3, 1, 6, 6)
    assert (
        nodes(export_torch(net.eval(), (x,), input_names=["x"]).model, "BatchNormalization") == []
    )
    exported = export_torch(net, (x,), input_names=["x"], keep="normalisation")
    assert exported.difference < 1e-5 and exported.notes == ()
    proto = onnx.load_from_string(exported.model)
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    found = nodes(exported.model, "BatchNormalization")
    for node, norm in zip(found, (net.b, net.d, net.f), strict=True):
        given = attributes(node)
        assert given["epsilon"] == pytest.approx(norm.eps)
        assert given["momentum"] == pytest.approx(1 - norm.momentum)
        np.testing.assert_array_equal(stored[node.input[3]], norm.running_mean)
        np.testing.assert_array_equal(stored[node.input[4]], norm.running_var)
    assert {o.domain for o in proto.opset_import} == {""}
    # The graph is otherwise what the exporter's optimisation makes of it.
    kinds = {n.op_type for n in proto.graph.node}
    assert "Constant" not in kinds and "Identity" not in kinds
    assert [s.kind for s in find_normalisations(exported.model)] == ["batch"] * 3


class Drops(nn.Module):
    """Every way to write a dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.first, self.lines = nn.Dropout(0.1), nn.Dropout1d(0.2)
        self.maps, self.boxes = nn.Dropout2d(0.3), nn.Dropout3d(0.4)
        self.inside = nn.Dropout(0.15, inplace=True)
        self.none = nn.Dropout(0.0)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        h = self.norm(self.conv(self.first(x)))
        h = self.lines(h)
        h = self.maps(h[..., None])
        h = self.boxes(h[..., None]).flatten(2)
        self.inside(h)
        h = functional.dropout(self.none(h), 0.25, self.training)
        h = functional.dropout1d(h, 0.35, self.training)
        return self.head(functional.dropout(h.flatten(1), training=self.training))


RATES = [0.1, 0.2, 0.3, 0.4, 0.15, 0.25, 0.35, 0.5]
WHOLE = [False, True, True, True, False, False, True, False]


@pytest.mark.parametrize("program", [False, True])
def test_every_dropout_stays_and_does_nothing(program):
    net, x = Drops(), torch.randn(4, 2, 6)
    net.norm.eval()  # and the rest in training mode
    before = {k: (v.training, id(v)) for k, v in net.named_modules()}
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    what = net
    if program:
        net.eval()
        dims = ({0: torch.export.Dim("n")},)
        what = torch.export.export(net, (x,), dynamic_shapes=dims)
        graph = str(what.graph)
    exported = export_torch(what, (x,), input_names=["x"], keep="dropout")
    assert exported.difference < 1e-5 and exported.notes == ()
    sites = find_dropouts(exported.model)
    assert [s.rate for s in sites] == RATES and [s.whole for s in sites] == WHOLE
    assert [s.shape for s in sites][:4] == [(2, 6), (6, 4), (6, 4, 1), (6, 4, 1, 1)]
    assert all(s.axis == 1 for s in sites if s.whole)
    for node in nodes(exported.model, "Dropout"):
        assert len(node.input) == 2 and len(node.output) == 1 and not node.attribute
    assert find_normalisations(exported.model)[0].kind == "batch"
    if program:
        assert str(what.graph) == graph
    else:
        assert before == {k: (v.training, id(v)) for k, v in net.named_modules()}
    for k, v in net.state_dict().items():
        assert torch.equal(v, weights[k])
    session = open_session(exported.model)
    first, second = (session.run(None, {"x": x.numpy()})[0] for _ in range(2))
    assert np.array_equal(first, second)


class Attention(nn.Module):
    def __init__(self, rate):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.drop = nn.Dropout(rate)

    def forward(self, x):
        return self.drop(self.attention(x, x, x, need_weights=False)[0])


def test_dropout_inside_attention_is_not_seen_and_this_is_said():
    x = torch.randn(3, 5, 8)
    exported = export_torch(Attention(0.2), (x,), input_names=["x"], keep="dropout")
    assert [s.rate for s in find_dropouts(exported.model)] == [0.2]
    [note] = exported.notes
    assert "one dropout was found" in note and "scaled_dot_product_attention" in note
    with pytest.raises(ModelError, match=r"no dropout that can be kept .*scaled_dot_product_att"):
        export_torch(Attention(0.0), (x,), input_names=["x"], keep="dropout")


def test_alpha_dropout_is_left_out():
    net = nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(0.2), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="AlphaDropout"):
        export_torch(net, (torch.randn(3, 3),), input_names=["x"], keep="dropout")
    assert net.training and net[1].training
