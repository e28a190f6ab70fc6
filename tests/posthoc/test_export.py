"""Exports of real torch modules, run in ONNX Runtime and opened as frozen models."""

import numpy as np
import onnx
import pytest
import torch

from posthoc.contract import ModelError
from posthoc.export import export_torch
from posthoc.frozen import open_frozen
from posthoc.runtime import open_session, session_specs


class Image(torch.nn.Module):
    """Convolution, batch norm and dropout before a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 3, 3)
        self.norm = torch.nn.BatchNorm2d(3)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(3 * 6 * 6, 4)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(torch.flatten(h, 1)))


class Fixed(torch.nn.Module):
    """Bakes the batch size of the example into the graph."""

    def forward(self, x):
        return x.reshape(4, 3)


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.cholesky(x @ x.transpose(1, 2) + torch.eye(3))


class Random(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Two(torch.nn.Module):
    """Two inputs, two outputs in a dictionary."""

    def forward(self, a, b):
        return {"sum": a + b, "product": a * b}


def rows(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def test_an_exported_module_gives_its_own_outputs_at_any_batch_size(capfd):
    module = Image()  # in training mode, as one forgets it
    exported = export_torch(
        module, (rows(1, 1, 8, 8),), input_names=["image"], rows=(rows(7, 1, 8, 8),)
    )
    assert 0 <= exported.difference < 1e-5
    assert module.training
    assert capfd.readouterr() == ("", "")
    session = open_session(exported.model)
    inputs, outputs = session_specs(session)
    assert inputs[0].name == "image" and inputs[0].shape == (-1, 1, 8, 8)
    assert outputs[0].shape == (-1, 4)
    module.eval()
    for n in (1, 2, 5):
        x = rows(n, 1, 8, 8, seed=n)
        with torch.no_grad():
            want = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], want, atol=1e-5)
    assert {o.version for o in onnx.load_from_string(exported.model).opset_import} == {20}


def test_the_head_of_an_export_is_the_modules_own():
    module = Image().eval()
    exported = export_torch(module, (rows(2, 1, 8, 8),), input_names=["x"])
    f = open_frozen(exported.model, task="classification")
    np.testing.assert_array_equal(f.head.weight, module.head.weight.detach().double().numpy())
    np.testing.assert_array_equal(f.head.bias, module.head.bias.detach().double().numpy())
    assert f.notes == () and f.z_dim == 4


def test_a_program_of_torch_export_is_taken_as_it_is():
    module = Image().eval()
    x = rows(3, 1, 8, 8)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    exported = export_torch(program, (x,), input_names=["x"])
    got = open_session(exported.model).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, module(x).detach().numpy(), atol=1e-5)


def test_several_inputs_and_outputs():
    a, b = rows(3, 4), rows(3, 4, seed=1)
    exported = export_torch(Two(), (a, b), input_names=["a", "b"])
    session = open_session(exported.model)
    assert [o.name for o in session.get_outputs()] == ["sum", "product"]  # as the module calls them
    total, product = session.run(None, {"a": a.numpy(), "b": b.numpy()})
    np.testing.assert_allclose(total, (a + b).numpy(), rtol=1e-6)
    np.testing.assert_allclose(product, (a * b).numpy(), rtol=1e-6)
    # By name, in any order.
    again = open_session(export_torch(Two(), {"b": b, "a": a}).model)
    assert [i.name for i in again.get_inputs()] == ["b", "a"]
    got = again.run(["product"], {"a": a.numpy(), "b": b.numpy()})[0]
    np.testing.assert_allclose(got, (a * b).numpy(), rtol=1e-6)
    with pytest.raises(ModelError, match="1 input names"):
        export_torch(Two(), (a, b), input_names=["a"])


@pytest.mark.parametrize(
    ("module", "shape", "why"),
    [
        (Fixed(), (4, 3), "the export fixed the batch of 'x' to 4"),
        (Unsupported(), (4, 3, 3), "operator aten.linalg_cholesky_ex has no ONNX form"),
        (Random(), (4, 3), "differs from the module by"),
    ],
)
def test_an_export_that_would_not_be_the_module_is_refused(module, shape, why):
    with pytest.raises(ModelError, match=why):
        export_torch(module, (rows(*shape),), input_names=["x"])
