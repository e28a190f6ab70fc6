"""Small graphs, and the same graph in ONNX Runtime."""

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from posthoc.network.autograd import Network

node = helper.make_node
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.bool_): TensorProto.BOOL,
}


def graph(nodes, feed, outputs=("y",), *, stored=None, opset=20, functions=(), domains=()):
    """A model whose inputs are those of ``feed``; its outputs are float32 unless it says so."""
    kind = next(iter(feed.values())).dtype
    made = helper.make_graph(
        list(nodes),
        "g",
        [
            helper.make_tensor_value_info(k, TYPES[v.dtype], [None] * v.ndim)
            for k, v in feed.items()
        ],
        [helper.make_tensor_value_info(o, TYPES[kind], None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (stored or {}).items()],
    )
    return helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", opset), *domains],
        ir_version=10,
        functions=list(functions),
    )


def runtime(model, feed, outputs=None):
    """Outputs by name, from ONNX Runtime as the graph stands."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = outputs or [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def tensors(feed):
    return {k: torch.from_numpy(np.array(v)) for k, v in feed.items()}


def assert_same(model, feed, tolerance=1e-4):
    """Every output, within ``tolerance`` of its largest value."""
    want = runtime(model, feed)
    with torch.no_grad():
        got = Network(model, list(want))(tensors(feed))
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert got[name].numpy().dtype == value.dtype, name
        scale = max(float(np.abs(value).max(initial=0)), 1e-6)
        np.testing.assert_allclose(got[name].numpy() / scale, value / scale, atol=tolerance, rtol=0)
