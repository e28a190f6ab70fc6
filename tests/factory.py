"""Small real models and bundles for tests: a frozen tanh network in ONNX, data it was not fitted
on, and the bundle that the real fit makes of both."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper

from calibration.bundle import GOLDEN, load_bundle, write_bundle
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from posthoc.contract import Task

COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("a", "b", "c", "d"),
    "regression": ("p", "q", "r"),
}
CLASSES = ("a", "b", "c")
HIDDEN = 16


def weights(task: Task, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded weights of the frozen network: inputs → 16 tanh units → 3 logits or 1 mean."""
    rng = np.random.default_rng(seed)
    d, out = len(COLUMNS[task]), 3 if task == "classification" else 1
    return {
        "w1": rng.normal(size=(d, HIDDEN)).astype(np.float32),
        "b1": rng.normal(size=HIDDEN).astype(np.float32),
        "w2": (rng.normal(size=(HIDDEN, out)) * (1.2 if out == 3 else 0.5)).astype(np.float32),
        "b2": rng.normal(size=out).astype(np.float32),
    }


def frozen_model(path: Path, task: Task = "classification", *, softmax: bool = True) -> Path:
    """Write the frozen network; a classifier ends in Softmax unless told otherwise."""
    tensors = weights(task)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h0"]),
        helper.make_node("Add", ["h0", "b1"], ["h1"]),
        helper.make_node("Tanh", ["h1"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["o0"], name="head"),
        helper.make_node("Add", ["o0", "b2"], ["o1"]),
    ]
    last = "Softmax" if task == "classification" and softmax else "Identity"
    nodes.append(helper.make_node(last, ["o1"], ["y"]))
    out = len(tensors["b2"])
    graph = helper.make_graph(
        nodes,
        "frozen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", len(COLUMNS[task])])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", out])],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests"
    )
    onnx.save(model, path)
    return path


def rows(task: Task, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels: classes drawn from the network at temperature 2 (so the network is
    over-confident), or its mean plus noise that grows with the first input."""
    rng = np.random.default_rng(seed)
    t = weights(task)
    x = rng.normal(size=(n, len(COLUMNS[task]))).astype(np.float32)
    z = np.tanh(x @ t["w1"] + t["b1"]) @ t["w2"] + t["b2"]
    if task == "classification":
        return x, (z / 2 + rng.gumbel(size=z.shape)).argmax(1)
    return x, z[:, 0] + rng.normal(size=n) * 0.3


def data(path: Path, task: Task = "classification", n: int = 4000, seed: int = 1) -> Path:
    """Write a Parquet table of inputs, a target column and an id column."""
    x, y = rows(task, n, seed)
    table = {c: x[:, i] for i, c in enumerate(COLUMNS[task])}
    table["id"] = np.asarray([f"r{i}" for i in range(n)])
    target = pa.array(np.asarray(CLASSES)[y]) if task == "classification" else pa.array(y)
    pq.write_table(pa.table({**table, "target": target}), path)
    return path


def tiny_bundle(path: Path, task: Task = "classification", **options: object) -> Path:
    """Fit a bundle at ``path`` (seconds). Its inputs come from the columns in COLUMNS; the
    mapping names the id column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = frozen_model(path.parent / f"{path.name}.onnx", task)
    table = data(path.parent / f"{path.name}.parquet", task)
    fit(
        model,
        table,
        path,
        FitOptions(task=task, **options),
        name="tiny",
        columns=Columns(
            target="target",
            inputs={"x": COLUMNS[task]},
            id="id",
            classes=CLASSES if task == "classification" else None,
        ),
        cache_dir=path.parent / f"{path.name}.cache",
    )
    return path


def version_of(bundle: Path, root: Path, name: str, version: str, *, golden: bool = True) -> Path:
    """The bundle once more as ROOT/<name>/<version>/; without ``golden`` its golden rows lie."""
    source = load_bundle(bundle)
    files = dict(source.files)
    if not golden:
        with np.load(io.BytesIO(files[GOLDEN])) as rows:
            lies = {
                k: v + 1 if k.startswith("out/") and v.dtype.kind == "f" else v
                for k, v in rows.items()
            }
        archive = io.BytesIO()
        np.savez(archive, **lies)
        files[GOLDEN] = archive.getvalue()
    manifest = source.manifest.model_copy(update={"name": name, "version": version})
    return write_bundle(root / name / version, manifest, files).path
