"""Every operator on the ONNX project's own cases: inputs, and the outputs its definition gives."""

import re
import warnings
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from posthoc.network.autograd import Network, unsupported
from posthoc.network.autograd.operators import OPERATORS
from tests.posthoc.network.autograd.graphs import assert_same, graph, node

OPSETS = (13, 14, 16, 17, 18, 20, 21, 22, 23)
# The types that torch has arithmetic for; the cases have unsigned, small and text ones too.
TYPES = {
    getattr(TensorProto, t) for t in ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "BOOL", "UINT8"]
}
TYPES |= {getattr(TensorProto, t) for t in ["INT8", "INT16", "INT32", "INT64"]}
ROUNDED = {"AveragePool", "GridSample"}  # cases that were written down with four decimals
ELSEWHERE = {
    # ONNX Runtime, by which frozen models run, and torch take the last pixel for the corner; the
    # case takes the size before rounding.
    "test_resize_downsample_scales_linear_align_corners",
    "test_resize_downsample_scales_cubic_align_corners",
    # Dropout is the identity here, and these draw a mask.
    *(f"test_training_dropout{s}" for s in ("", "_default", "_mask", "_default_mask")),
}
REFUSED = {
    "BatchNormalization": {
        "test_batchnorm_example_training_mode",
        "test_batchnorm_epsilon_training_mode",
    },
    "MaxPool": {
        "test_maxpool_with_argmax_2d_precomputed_pads",
        "test_maxpool_with_argmax_2d_precomputed_strides",
    },
    "Resize": {
        "test_resize_tf_crop_and_resize",
        "test_resize_tf_crop_and_resize_axes_2_3",
        "test_resize_tf_crop_and_resize_axes_3_2",
        "test_resize_tf_crop_and_resize_extrapolation_value",
    },
}


@cache
def cases():
    """(those of one operator, by operator; those that write an operator out as its function)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found = load_model_tests(kind="node")
    alone, written_out = {}, []
    for case in found:
        nodes = case.model.graph.node
        values = (*case.model.graph.input, *case.model.graph.output)
        plain = all(v.type.tensor_type.elem_type in TYPES for v in values)
        if not plain or case.name in ELSEWHERE:
            continue
        if len(nodes) == 1 and nodes[0].domain == "":
            alone.setdefault(nodes[0].op_type, []).append(case)
        else:
            written_out.append(case)
    return alone, written_out


def at_opset(model, opset):
    """The model at another opset; None where its operators are written otherwise there."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.opset_import[:]
    other.opset_import.append(helper.make_opsetid("", opset))
    other.ir_version = max(10, model.ir_version)
    try:
        onnx.checker.check_model(other)
    except onnx.checker.ValidationError:
        return None
    return other


def version(model):
    return max(o.version for o in model.opset_import if o.domain == "")


def as_tensor(array):
    if isinstance(array, TensorProto):
        array = numpy_helper.to_array(array)
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())


def check(case, model, rounded=False):
    """The case on this model."""
    outputs = [o.name for o in model.graph.output if o.name]
    network = Network(model, outputs)
    for given, wanted in case.data_sets:
        names = [i.name for i in model.graph.input]
        got = network({n: as_tensor(x) for n, x in zip(names, given, strict=True)})
        for name, want in zip(outputs, map(as_tensor, wanted), strict=True):
            assert (got[name].shape, got[name].dtype) == (want.shape, want.dtype)
            loose = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(want.dtype)
            loose = 3e-4 if rounded else loose
            torch.testing.assert_close(
                got[name],
                want,
                rtol=loose or 2e-5,
                atol=loose or 1e-5,
                equal_nan=True,
            )


@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_operator(kind):
    """As its own cases say, at the oldest (from 13 on) and the newest opset that has the node."""
    ran, refused = 0, set()
    for case in cases()[0][kind]:
        newest = max(version(case.model), 13)
        # Per group before 21: test_group_normalisation_before_21.
        older = [o for o in OPSETS if o < newest and (kind != "GroupNormalization" or o > 20)]
        models = [at_opset(case.model, o) for o in (*older, newest)]
        models = [m for m in models if m is not None]
        for model in models[:1] + models[1:][-1:]:
            if unsupported(model, [o.name for o in model.graph.output if o.name]):
                refused.add(case.name)
            else:
                check(case, model, kind in ROUNDED)
                ran += 1
    assert ran and refused == REFUSED.get(kind, set())


def test_operators_written_out():
    """Graphs of many nodes: operators as the functions that define them."""
    ran = 0
    for case in cases()[1]:
        outputs = [o.name for o in case.model.graph.output if o.name]
        standard = all(o.domain == "" for o in case.model.opset_import)
        if standard and version(case.model) >= 13 and not unsupported(case.model, outputs):
            check(case, case.model)
            ran += 1
    assert ran > 250


@pytest.mark.parametrize("kind", ["Attention", "RotaryEmbedding"])
def test_operators_that_are_functions(kind):
    """No translation of their own: ONNX's function is written out."""
    ran = 0
    for case in cases()[0][kind]:
        if not unsupported(case.model, [o.name for o in case.model.graph.output if o.name]):
            check(case, case.model)
            ran += 1
    assert ran >= 2


@pytest.mark.parametrize("kind", [k for k in OPERATORS if re.match("Reduce(?!Sum$)", k)])
@pytest.mark.parametrize("opset", [13, 17])
def test_axes_as_an_attribute(kind, opset):
    """Reductions before opset 18, against ONNX Runtime."""
    x = np.random.default_rng(0).uniform(0.5, 2, (2, 3, 4, 2)).astype(np.float32)
    for attributes in ({}, {"axes": [1]}, {"axes": [-1, 1], "keepdims": 0}):
        assert_same(
            graph([node(kind, ["x"], ["y"], **attributes)], {"x": x}, opset=opset), {"x": x}
        )


def test_group_normalisation_before_21():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 5)).astype(np.float32)
    stored = {
        "s": rng.normal(size=3).astype(np.float32),
        "b": rng.normal(size=3).astype(np.float32),
    }
    norm = node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=3)
    assert_same(graph([norm], {"x": x}, stored=stored, opset=18), {"x": x})
