"""Bundles of models that are not one plain float ONNX file: torch factories, a graph in front,
dynamic quantisation."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from safetensors.torch import save_file

from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from tests.calibration import networks
from tests.posthoc import torch_nets
from tests.posthoc.networks import products_overflow

OPTIONS = FitOptions(task="classification", method="laplace", ood="gen")
HERE = "tests.posthoc.torch_nets"


def front(path: Path) -> Path:
    """(raw − 3) / 2 of four inputs."""
    graph = helper.make_graph(
        [
            helper.make_node("Sub", ["raw", "mean"], ["h"]),
            helper.make_node("Div", ["h", "scale"], ["scaled"]),
        ],
        "front",
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["N", 4])],
        [
            numpy_helper.from_array(np.float32(3), "mean"),
            numpy_helper.from_array(np.float32(2), "scale"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def test_a_torch_factory_behind_a_graph_becomes_a_bundle(tmp_path: Path) -> None:
    module = torch_nets.Table().eval()
    with torch.no_grad():
        module.head.weight.mul_(4)
    checkpoint = tmp_path / "w.safetensors"
    save_file(module.state_dict(), checkpoint)
    x = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    with torch.no_grad():
        z = module(torch.from_numpy(x)).numpy()
    y = (z / 2 + np.random.default_rng(1).gumbel(size=z.shape)).argmax(1)
    raw = x * 2 + 3
    pq.write_table(
        pa.table({**{c: raw[:, i] for i, c in enumerate("abcd")}, "y": y}), tmp_path / "t.parquet"
    )
    how = {
        "columns": Columns(target="y", inputs={"raw": tuple("abcd")}),
        "cache_dir": tmp_path / "cache",
        "checkpoint": checkpoint,
        "preprocess": front(tmp_path / "pre.onnx"),
    }
    made = [
        fit(f"{HERE}:Table", tmp_path / "t.parquet", tmp_path / name, OPTIONS, **how)  # type: ignore[arg-type]
        for name in ("one", "two")
    ]
    manifest = made[0].manifest
    assert manifest.name == "Table" and [s.name for s in manifest.inputs] == ["raw"]
    assert manifest.data["sources"] == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (checkpoint, tmp_path / "pre.onnx")
    }
    # The export is the same each time, so that the second fit found the features in the cache.
    assert manifest.frozen.sha256 == made[1].manifest.frozen.sha256
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1
    found = Predictor(made[0].path).predict({"raw": raw[:50]})
    np.testing.assert_array_equal(found.label, z[:50].argmax(1))


def test_a_dynamically_quantised_model_is_held_against_itself_in_one_batch(
    tmp_path: Path,
) -> None:
    """Its answers depend on the batch, by more than a fused graph may be off."""
    logging.disable(logging.WARNING)
    source = networks.network(tmp_path / "float.onnx")
    quantize_dynamic(source, tmp_path / "model.onnx", reduce_range=products_overflow())
    logging.disable(logging.NOTSET)
    model = tmp_path / "model.onnx"
    bundle = fit(
        model,
        networks.table(source),
        tmp_path / "bundle",
        OPTIONS,
        columns=networks.columns(model),
        cache_dir=tmp_path / "cache",
    )
    x = networks.inputs(64, seed=3)
    predictor = Predictor(bundle.path)
    predictor.self_check()
    found = predictor.predict({"x": x})
    np.testing.assert_array_equal(found.label, networks.bare(model, x).argmax(1))
    assert bundle.manifest.frozen.features == networks.HIDDEN
