"""open_model end to end: torch modules and archives exported and checked on the rows of a table,
preprocessing in front, and what is refused before any data is read."""

import hashlib
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import save_file

from posthoc import registry
from posthoc.contract import DataError, ModelError
from posthoc.frozen import expose, open_frozen
from posthoc.model.samples import Samples
from posthoc.opening import Source, open_model, remaining_modules
from posthoc.runtime import open_session
from tests.posthoc import torch_nets
from tests.posthoc.model.test_torch_models import Bomb
from tests.posthoc.networks import AXES, BODY, HEAD, LOGITS, PHI, check_exposed, model, node

HERE = "tests.posthoc.torch_nets"
N = 40


def table(folder, **columns):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 4))
    made = {**{c: x[:, i] for i, c in enumerate("abcd")}, "y": np.arange(N) % 3, **columns}
    path = folder / "t.parquet"
    pq.write_table(pa.table(made), path)
    return Samples(path, "y", {"x": list("abcd")})


def same(frozen, module, **inputs):
    """The exposed graph gives what the module gives, on other batches than the checked ones."""
    module = module.eval()
    session = open_session(expose(frozen))
    for rows in (slice(0, 1), slice(3, 10)):
        feed = {k: v[rows] for k, v in inputs.items()}
        with torch.no_grad():
            want = module(**{k: torch.from_numpy(v) for k, v in feed.items()})
        want = want["logits"] if isinstance(want, dict) else want
        [got] = session.run([frozen.output], feed)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
        phi, z = session.run([frozen.phi, frozen.z], feed)
        np.testing.assert_allclose(
            phi @ frozen.head.weight.T + frozen.head.bias, z, rtol=1e-4, atol=1e-5
        )


def x_of(samples):
    t = pq.read_table(samples.data)
    return np.stack([t[c].to_numpy() for c in "abcd"], 1).astype(np.float32)


# ---- factories


def test_a_factory_with_its_weights_becomes_a_frozen_model(tmp_path, capfd):
    module = torch_nets.Table()
    with torch.no_grad():
        module.head.weight.mul_(3)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    samples = table(tmp_path)
    source = Source(f"{HERE}:Table", checkpoint=tmp_path / "w.safetensors")
    f = open_model(source, task="classification", samples=samples)
    assert [(s.name, s.dtype, s.shape) for s in f.inputs] == [("x", "float32", (-1, 4))]
    np.testing.assert_allclose(f.head.weight, module.head.weight.detach().numpy())
    same(f, module, x=x_of(samples))
    [note] = f.notes
    assert "exported to ONNX" in note and "on 32 rows" in note
    assert float(note.split("at most ")[1].split(" ")[0]) < 1e-5
    weights = (tmp_path / "w.safetensors").read_bytes()
    assert f.file == "Table" and f.sha256 == hashlib.sha256(f.model).hexdigest()
    assert f.sources == (("w.safetensors", hashlib.sha256(weights).hexdigest()),)
    assert capfd.readouterr() == ("", "")


def test_the_same_factory_gives_the_same_bytes_in_another_process(tmp_path):
    """The key of a cache is the hash of the model."""
    samples = table(tmp_path)
    here = open_model(Source(f"{HERE}:Table"), task="classification", samples=samples)
    code = (
        "from posthoc.opening import Source, open_model\n"
        "from posthoc.model.samples import Samples\n"
        f"s = Samples({str(samples.data)!r}, 'y', {{'x': list('abcd')}})\n"
        f"print(open_model(Source('{HERE}:Table'), task='classification', samples=s).sha256)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == here.sha256


def test_a_transformer_that_scores_tokens_and_takes_the_last(tmp_path):
    """Optional inputs are those that have a column; the head's features are those of the token
    that the logits are of."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30, (N, 7))
    mask = (np.arange(7) < rng.integers(1, 8, N)[:, None]).astype(np.int64)
    samples = table(tmp_path, input_ids=pa.array(list(ids)), attention_mask=pa.array(list(mask)))
    samples = Samples(samples.data, "y")
    source = Source(f"{HERE}:Language", output="logits")
    f = open_model(source, task="classification", samples=samples)
    assert [(s.name, s.dtype, s.shape) for s in f.inputs] == [
        ("input_ids", "int64", (-1, 7)),
        ("attention_mask", "int64", (-1, 7)),
    ]
    assert [s.name for s in f.outputs] == ["logits", "hidden"]
    assert f.head.weight.shape == (3, 16) and (f.head.bias == 0).all()
    same(f, torch_nets.Language(), input_ids=ids, attention_mask=mask)
    with pytest.raises(ModelError, match="has outputs logits, hidden; choose one with --output"):
        open_model(Source(f"{HERE}:Language"), task="classification", samples=samples)


def test_integers_stand_for_fractions_where_the_module_wants_these(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (N, 1, 6, 6)).astype(np.uint8)
    samples = table(tmp_path, image=pa.FixedShapeTensorArray.from_numpy_ndarray(pixels))
    f = open_model(
        Source(f"{HERE}:Image"), task="classification", samples=Samples(samples.data, "y")
    )
    assert [(s.dtype, s.shape) for s in f.inputs] == [("float32", (-1, 1, 6, 6))]
    assert f.tail[0] == "Softmax" and f.head.weight.shape == (3, 6) and not f.z_is_probs
    same(f, torch_nets.Image(), image=pixels.astype(np.float32))


def test_integers_of_single_columns_are_one_a_row(tmp_path):
    user, item = np.arange(N) % 20, np.arange(N) % 10
    samples = table(tmp_path, user=user, item=item)
    f = open_model(Source(f"{HERE}:Pairs"), task="regression", samples=Samples(samples.data, "y"))
    assert [(s.name, s.dtype, s.shape) for s in f.inputs] == [
        ("user", "int64", (-1,)),
        ("item", "int64", (-1,)),
    ]
    assert f.z_dim == 1 and f.head.weight.shape == (1, 8)


def test_the_modules_own_precision_is_fed(tmp_path):
    f = open_model(Source(f"{HERE}:Doubles"), task="classification", samples=table(tmp_path))
    assert f.inputs[0].dtype == "float64" and f.head is not None


def test_an_example_gives_shapes_that_the_table_does_not_show(tmp_path):
    """A flat list of 36 numbers is an image of 6×6 because the example says so."""
    pixels = np.random.default_rng(0).random((N, 36)).astype(np.float32)
    samples = table(tmp_path, image=pa.array(list(pixels)))
    samples = Samples(samples.data, "y")
    with pytest.raises(ModelError, match=r"float32 \(32, 36\).*give rows of the right shape"):
        open_model(Source(f"{HERE}:Image"), task="classification", samples=samples)
    np.savez(tmp_path / "e.npz", image=np.zeros((2, 1, 6, 6), np.float32))
    source = Source(f"{HERE}:Image", example=tmp_path / "e.npz")
    f = open_model(source, task="classification", samples=samples)
    assert f.inputs[0].shape == (-1, 1, 6, 6) and "on 32 rows" in f.notes[0]
    # Without a table, the example's rows are what the export is checked on.
    np.savez(tmp_path / "e.npz", image=pixels.reshape(-1, 1, 6, 6)[:9])
    assert "on 9 rows" in open_model(source, task="classification").notes[0]


def test_what_cannot_be_exported_names_the_operator(tmp_path):
    samples = table(tmp_path)
    with pytest.raises(
        ModelError, match=r"Unsupported: operator aten\.linalg_cholesky_ex has no ONNX form"
    ):
        open_model(Source(f"{HERE}:Unsupported"), task="regression", samples=samples)


def test_columns_that_do_not_fill_the_inputs_are_the_tables_fault(tmp_path):
    samples = Samples(table(tmp_path).data, "y", {"image": ["a", "b"]})
    with pytest.raises(ModelError, match=r"float32 \(32, 2\)"):
        open_model(Source(f"{HERE}:Image"), task="classification", samples=samples)
    samples = Samples(table(tmp_path).data, "y", {"other": ["a", "b"]})
    with pytest.raises(DataError, match="no input 'other'; it takes image"):
        open_model(Source(f"{HERE}:Image"), task="classification", samples=samples)
    with pytest.raises(ModelError, match="exported on real rows; give some with --example"):
        open_model(Source(f"{HERE}:Table"), task="classification")


# ---- archives


def program(path, dynamic=True):
    shapes = {"x": {0: torch.export.Dim("n")}} if dynamic else None
    made = torch.export.export(
        torch_nets.Table().eval(), (), {"x": torch.zeros(4, 4)}, dynamic_shapes=shapes
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(made, path)
    return path


def test_an_archive_is_opened_when_it_is_trusted(tmp_path):
    path, samples = program(tmp_path / "m.pt2"), table(tmp_path)
    f = open_model(Source(path, trust_pickle=True), task="classification", samples=samples)
    assert f.file == "m.pt2" and f.inputs[0].shape == (-1, 4)
    assert f.sources == (("m.pt2", hashlib.sha256(path.read_bytes()).hexdigest()),)
    same(f, torch_nets.Table(), x=x_of(samples))
    fixed = program(tmp_path / "fixed.pt2", dynamic=False)
    with pytest.raises(ModelError, match=r"fixed the batch of 'x' to 4; export it with a dynamic"):
        open_model(Source(fixed, trust_pickle=True), task="classification", samples=samples)


def test_an_archive_is_not_unpickled_unless_it_is_trusted(tmp_path):
    path = program(tmp_path / "m.pt2")
    with zipfile.ZipFile(path) as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    torch.save(Bomb(), tmp_path / "bomb")
    [inner] = [n for n in parts if n.endswith("sample_inputs/model.pt")]
    parts[inner] = (tmp_path / "bomb").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    torch_nets.called.clear()
    with pytest.raises(ModelError, match=r"unpickles.*ONNX.*safetensors.*--trust-pickle"):
        open_model(Source(path), task="classification", samples=table(tmp_path))
    assert torch_nets.called == []
    # Trusted, torch runs what is in it: that is what the flag is for.
    with pytest.raises(ModelError):
        open_model(Source(path, trust_pickle=True), task="classification", samples=table(tmp_path))
    assert torch_nets.called == ["boom"]
    torch_nets.called.clear()


MISPLACED = {
    "a checkpoint": (Source("m.pth"), r"m\.pth holds weights, or a pickled module.*safetensors"),
    "safetensors alone": (Source("m.safetensors"), "give module:factory with --checkpoint"),
    "weights of an archive": (
        Source("m.pt2", checkpoint="w.safetensors", trust_pickle=True),
        "--checkpoint goes with module:factory",
    ),
    "weights of ONNX": (Source("m.onnx", checkpoint="w.pt"), r"m\.onnx holds its own"),
    "trust where nothing is unpickled": (
        Source(f"{HERE}:Table", checkpoint="w.pth", trust_pickle=True),
        "--trust-pickle is for .pt2 archives",
    ),
    "no such file": (Source("m.onnx"), r"m\.onnx: cannot be read"),
    "no such archive": (Source("m.pt2", trust_pickle=True), "no such file"),
    "no such graph in front": (Source("m.onnx", preprocess="p.onnx"), r"p\.onnx: cannot be read"),
}


@pytest.mark.parametrize("what", MISPLACED)
def test_what_is_misplaced_is_refused_before_anything_is_read(what):
    source, why = MISPLACED[what]
    never = Samples("never.parquet", "y")
    with pytest.raises(ModelError, match=why):
        open_model(source, task="classification", samples=never)


# ---- preprocessing

SCALE = [node("Sub", ["raw", "mean"], ["h"]), node("Div", ["h", "scale"], ["scaled"])]


def scaler(path, width):
    path.write_bytes(
        model(
            SCALE,
            ("scaled",),
            inputs=[("raw", TensorProto.FLOAT, ["N", width])],
            shapes={"scaled": ["N", width]},
            extra={"mean": np.float32(3), "scale": np.float32(2)},
        )
    )
    return path


def test_a_graph_in_front_becomes_part_of_the_frozen_model(tmp_path):
    own = tmp_path / "m.onnx"
    own.write_bytes(model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])]))
    front = scaler(tmp_path / "pre.onnx", 5)
    f = open_model(Source(own, preprocess=front), task="classification")
    x = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)
    assert [s.name for s in f.inputs] == ["raw"] and f.file == "m.onnx"
    check_exposed(f, PHI, LOGITS, {"raw": x * 2 + 3})
    assert f.sha256 == hashlib.sha256(f.model).hexdigest() and f.size == len(f.model)
    assert f.sources == tuple(
        (p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in (own, front)
    )
    assert f.notes == ("pre.onnx runs in front of the model",)


def test_a_torch_model_is_exported_on_what_the_graph_in_front_gives(tmp_path):
    samples = table(tmp_path)
    samples = Samples(samples.data, "y", {"raw": list("abcd")})
    front = scaler(tmp_path / "pre.onnx", 4)
    source = Source(program(tmp_path / "m.pt2"), preprocess=front, trust_pickle=True)
    f = open_model(source, task="classification", samples=samples)
    assert [s.name for s in f.inputs] == ["raw"]
    x = x_of(samples)
    [got] = open_session(f.model).run([f.output], {"raw": x})
    with torch.no_grad():
        want = torch_nets.Table().eval()(torch.from_numpy((x - 3) / 2)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# ---- what remains


def test_what_remains_for_a_black_box_is_what_needs_no_features():
    whole = open_frozen(model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])]), task="classification")
    box = open_frozen(model([*BODY, *HEAD, node("Relu", ["z"], ["y"])], extra=AXES),
                      task="classification")  # fmt: skip
    every = remaining_modules(whole, "classification")
    some = remaining_modules(box, "classification")
    known = {**registry.MODULES, **registry.SCORES}
    for name in known:
        info = registry.info(name)
        fits = "classification" in info.tasks
        if "network" in info.needs:  # this one has no normalisation and is no image
            assert (name in every) == (name in some) == (name == "mc_dropout")
            continue
        assert (name in every) == (fits and not info.needs - {"features", "linear_head", "labels"})
        assert (name in some) == (fits and info.needs <= {"labels"})
    assert set(some) < set(every) and "gen" in some and "rmds" in every
