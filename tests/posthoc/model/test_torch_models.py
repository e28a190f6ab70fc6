"""Torch models on disk: what is loaded, and what is refused without running any of its code."""

import pickle
import sys
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file, save_model

from posthoc.contract import ModelError
from posthoc.model.torch_models import (
    float_type,
    input_names,
    load_program,
    load_weights,
    make_module,
    program_inputs,
    working_directory,
)
from tests.posthoc import torch_nets

HERE = "tests.posthoc.torch_nets"


class Bomb:
    """Unpickling it calls a function, as any pickle may."""

    def __reduce__(self):
        return torch_nets.boom, ()


@pytest.fixture(autouse=True)
def nothing_was_called():
    torch_nets.called.clear()
    yield
    assert torch_nets.called == []


def saved(module, path):
    state = module.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def other():
    """The same network with other weights."""
    module = torch_nets.Table()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    return module


def equal(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_the_bomb_is_one():
    pickle.loads(pickle.dumps(Bomb()))
    assert torch_nets.called.pop() == "boom"


# ---- factories


def test_a_factory_makes_a_module():
    assert isinstance(make_module(f"{HERE}:Table"), torch_nets.Table)
    assert make_module(f"{HERE}:module") is torch_nets.module


def test_a_factory_of_the_working_directory_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_own_net.py").write_text(
        "import torch\n\nclass Make:\n    @staticmethod\n    def it():\n"
        "        return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with working_directory():
        made = make_module("my_own_net:Make.it")
    assert isinstance(made, torch.nn.Linear) and sys.path == before
    del sys.modules["my_own_net"]


REFUSED = {
    "nowhere:make": "nowhere cannot be imported from .*ModuleNotFoundError",
    f"{HERE}:nothing": "has no 'nothing'",
    f"{HERE}:not_a_factory": "is int, not a function that makes a module",
    f"{HERE}:needs_an_argument": "called without an argument, failed .*missing 1 required",
    f"{HERE}:fails": r"failed \(FileNotFoundError: no such config\)",
    f"{HERE}:gives_a_function": "returned function, not a torch.nn.Module",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_factory_that_makes_no_module_is_refused_by_name(spec):
    with pytest.raises(ModelError, match=REFUSED[spec]) as error:
        make_module(spec)
    assert str(error.value).startswith(spec)


def test_a_factory_whose_file_is_broken_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    with working_directory(), pytest.raises(ModelError, match=r"broken_net cannot .*SyntaxError"):
        make_module("broken_net:make")


def test_the_inputs_are_the_parameters_of_forward():
    assert input_names(torch_nets.Table(), lambda n: False) == ["x"]
    assert input_names(torch_nets.Table(), lambda n: n == "scale") == ["x", "scale"]
    wanted = {"input_ids", "attention_mask", "y"}
    assert input_names(torch_nets.Language(), wanted.__contains__) == [
        "input_ids",
        "attention_mask",
    ]
    with pytest.raises(ModelError, match=r"forward\(\*xs\) does not name its inputs"):
        input_names(torch_nets.Nameless(), lambda n: True)
    assert float_type(torch_nets.Doubles()) == "float64"
    assert float_type(torch_nets.Unsupported()) == "float32"


# ---- weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_go_where_they_belong(tmp_path, suffix):
    module = torch_nets.Table()
    load_weights(module, saved(other(), tmp_path / f"w{suffix}"))
    assert equal(module, other())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_checkpoint_of_a_training_run_is_unwrapped(tmp_path, key):
    path = tmp_path / "last.ckpt"
    torch.save({key: other().state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    module = torch_nets.Table()
    load_weights(module, path)
    assert equal(module, other())


def test_tied_weights_may_be_stored_once(tmp_path):
    module, path = torch_nets.Tied(), tmp_path / "w.safetensors"
    with torch.no_grad():
        module.first.weight.fill_(2.0)
    save_model(module, path)
    fresh = torch_nets.Tied()
    load_weights(fresh, path)
    assert equal(fresh, module) and fresh.first.weight is fresh.second.weight


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    state = torch_nets.Table().state_dict()
    save_file({k: v for k, v in state.items() if k != "head.bias"} | {"extra": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"it lacks 'head\.bias'; the module has no 'extra'"):
        load_weights(torch_nets.Table(), path)
    save_file(state | {"head.weight": torch.ones(3, 9)}, path)
    with pytest.raises(
        ModelError, match=r"'head\.weight' has shape \(3, 9\), the module's has \(3, 8\)"
    ):
        load_weights(torch_nets.Table(), path)
    save_file({f"layer{i}": torch.ones(1) for i in range(40)}, path)
    with pytest.raises(ModelError, match=r"'layer0', .* and 35 more"):
        load_weights(torch_nets.Table(), path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hostile_header(path):
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize("damage", [cut, hostile_header, lambda p: p.write_bytes(b"")])
def test_damaged_safetensors_are_refused(tmp_path, damage):
    path = saved(other(), tmp_path / "w.safetensors")
    damage(path)
    with pytest.raises(ModelError, match=r"w\.safetensors is not a whole safetensors file"):
        load_weights(torch_nets.Table(), path)


NOT_WEIGHTS = {
    "a whole module": lambda p: torch.save(torch_nets.Table(), p),
    "a reducer": lambda p: torch.save({"state_dict": Bomb()}, p),
    "a bare pickle": lambda p: p.write_bytes(pickle.dumps(Bomb())),
    "an old pickle": lambda p: torch.save(Bomb(), p, _use_new_zipfile_serialization=False),
    "cut off": lambda p: (torch.save(other().state_dict(), p), cut(p)),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello"),
    "TorchScript": lambda p: scripted(p),
}


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch_nets.Table().eval(), torch.zeros(2, 4)), path)


@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_a_checkpoint_that_needs_unpickling_or_is_damaged_runs_nothing(tmp_path, what):
    path = tmp_path / "w.pth"
    NOT_WEIGHTS[what](path)
    with pytest.raises(ModelError, match=r"w\.pth is damaged or holds more than tensors, and is"):
        load_weights(torch_nets.Table(), path)


def test_a_checkpoint_without_tensors_by_name_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    for content, why in (
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"epoch": 3, "lr": 0.1}, "keys 'epoch', 'lr'"),
    ):
        torch.save(content, path)
        with pytest.raises(ModelError, match=why):
            load_weights(torch_nets.Table(), path)


def test_weights_of_an_unknown_kind_or_missing_are_refused(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights are read from \.safetensors, or from \.pt"):
        load_weights(torch_nets.Table(), tmp_path / "w.npz")
    with pytest.raises(ModelError, match="no such file"):
        load_weights(torch_nets.Table(), tmp_path / "w.pt")


# ---- programs


def program(path, module=None, args=(), kwargs=None, shapes=None):
    module = (module or torch_nets.Table()).eval()
    made = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(made, path)
    return path


N = torch.export.Dim("n")


def test_a_program_tells_its_inputs(tmp_path):
    path = program(
        tmp_path / "m.pt2",
        args=(torch.zeros(3, 4),),
        kwargs={"scale": torch.ones(3, 1, dtype=torch.float64)},
        shapes={"x": {0: N}, "scale": {0: N}},
    )
    inputs = program_inputs(load_program(path))
    assert [(s.name, s.dtype, s.shape) for s in inputs] == [
        ("x", "float32", (-1, 4)),
        ("scale", "float64", (-1, 1)),
    ]


def test_a_program_of_other_things_than_tensors_is_refused(tmp_path):
    class Lists(torch.nn.Module):
        def forward(self, xs):
            return xs[0] + xs[1]

    class Half(torch.nn.Module):
        def forward(self, x):
            return x + 1

    path = program(tmp_path / "m.pt2", Lists(), ([torch.zeros(3, 4), torch.zeros(3, 4)],))
    with pytest.raises(ModelError, match="tensors inside lists"):
        program_inputs(load_program(path))
    path = program(tmp_path / "h.pt2", Half(), (torch.zeros(3, 4, dtype=torch.bfloat16),))
    with pytest.raises(ModelError, match="input 'x' of the program is bfloat16"):
        program_inputs(load_program(path))


@pytest.mark.parametrize("damage", ["cut", "text", "zip", "missing"])
def test_a_damaged_program_is_refused(tmp_path, damage, capfd):
    path = tmp_path / "m.pt2"
    if damage == "cut":
        program(path, args=(torch.zeros(3, 4),))
        cut(path)
    elif damage == "text":
        path.write_text("hello")
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("m/models/model.json", "{}")
    with pytest.raises(ModelError, match=r"m\.pt2(: no such file| is not a whole torch\.export)"):
        load_program(path)
