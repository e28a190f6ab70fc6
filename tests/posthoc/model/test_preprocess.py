"""A preprocessing graph fused in front, against the two graphs run one after the other."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from posthoc.contract import ModelError
from posthoc.frozen import open_frozen
from posthoc.model.preprocess import fuse
from posthoc.runtime import open_session, session_specs
from tests.posthoc.networks import BODY, HEAD, LOGITS, PHI, D, X, check_exposed, model, node

SOFTMAX = node("Softmax", ["z"], ["y"])
MEAN, SCALE = np.float32(3), np.float32(2)
RAW = {"x": X * SCALE + MEAN}


def front(nodes=None, outputs=("scaled",), **kwargs):
    """(x − 3) / 2, unless told otherwise."""
    nodes = nodes or [node("Sub", ["x", "mean"], ["h"]), node("Div", ["h", "scale"], ["scaled"])]
    extra = {"mean": MEAN, "scale": SCALE, **kwargs.pop("extra", {})}
    shapes = kwargs.pop("shapes", {o: ["N", D] for o in outputs})
    return model(nodes, outputs, extra=extra, shapes=shapes, **kwargs)


def classifier(**kwargs):
    return model([*BODY, *HEAD, SOFTMAX], **kwargs)


def fused(before, after, notes=None):
    return fuse(
        onnx.load_from_string(before),
        onnx.load_from_string(after),
        name="pre.onnx",
        notes=[] if notes is None else notes,
    )


def inputs_of(data):
    return [s.name for s in session_specs(open_session(data))[0]]


def test_the_only_output_goes_to_the_only_input():
    """Both call their input x, and inner tensors h, w1; the user's names stay."""
    data = fused(front(), classifier())
    assert inputs_of(data) == ["x"]
    [want] = open_session(classifier()).run(None, {"x": (RAW["x"] - MEAN) / SCALE})
    np.testing.assert_array_equal(open_session(data).run(["y"], RAW)[0], want)
    f = open_frozen(data, task="classification")
    assert f.head_node == "head" and [s.name for s in f.outputs] == ["y"]
    check_exposed(f, PHI, LOGITS, RAW)


def test_outputs_are_matched_by_name_and_other_inputs_stay():
    body = [
        node("Add", ["left", "right"], ["x"]),
        *BODY,
        *HEAD,
        SOFTMAX,
    ]
    after = model(body, inputs=[("left", 1, ["N", D]), ("right", 1, ["N", D])])
    before = front(
        [node("Sub", ["raw", "mean"], ["h"]), node("Div", ["h", "scale"], ["left"])],
        ("left",),
        inputs=[("raw", 1, ["N", D])],
    )
    data = fused(before, after)
    assert inputs_of(data) == ["raw", "right"]
    feed = {"raw": RAW["x"], "right": np.zeros_like(X)}
    f = open_frozen(data, task="classification")
    check_exposed(f, PHI, LOGITS, feed)


def test_every_clash_of_names_is_resolved():
    """Constants, inner tensors, nodes, and an output of the first called as one of the second."""
    nodes = [
        node("Sub", ["x", "w1"], ["h"], name="head"),
        node("Div", ["h", "b2"], ["m"], name="own"),
        node("Identity", ["m"], ["y"]),
    ]
    before = front(nodes, ("y",), extra={"w1": MEAN, "b2": SCALE})
    data = fused(before, classifier())
    proto = onnx.load_from_string(data)
    names = [n.name for n in proto.graph.node if n.name]
    assert len(names) == len(set(names)) and names.count("head") == 1
    f = open_frozen(data, task="classification", head="head")
    check_exposed(f, PHI, LOGITS, RAW)


def test_graphs_inside_nodes_follow_a_renaming():
    """A branch of the first graph reads a tensor that the second has too."""
    branch = helper.make_graph(
        [node("Sub", ["x", "w1"], ["inside"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, ["N", D])],
    )
    nodes = [
        node("If", ["yes"], ["h"], then_branch=branch, else_branch=branch),
        node("Div", ["h", "scale"], ["scaled"]),
    ]
    made = front(nodes, extra={"yes": np.array(True)})
    proto = onnx.load_from_string(made)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(MEAN), "w1"))
    data = fused(proto.SerializeToString(), classifier())
    check_exposed(open_frozen(data, task="classification"), PHI, LOGITS, RAW)


@pytest.mark.parametrize(("first", "second"), [(13, 17), (17, 13), (9, 17), (20, 15)])
def test_opsets_are_brought_together(first, second):
    notes = []
    data = fused(
        front(opset=first, ir_version=8 if first > 9 else 6), classifier(opset=second), notes
    )
    have = {o.domain: o.version for o in onnx.load_from_string(data).opset_import}
    assert have[""] == max(first, second) and "converted from opset" in notes[0]
    check_exposed(open_frozen(data, task="classification"), PHI, LOGITS, RAW)


def test_operators_of_other_domains_come_along():
    scaler = node("Scaler", ["x"], ["scaled"], domain="ai.onnx.ml", offset=[3.0], scale=[0.5])
    before = front([scaler], opsets=[helper.make_opsetid("ai.onnx.ml", 1)])
    data = fused(before, classifier())
    check_exposed(open_frozen(data, task="classification"), PHI, LOGITS, RAW)
    other = model(
        [node("Scaler", ["x"], ["s"], domain="ai.onnx.ml", offset=[0.0], scale=[1.0]),
         node("MatMul", ["s", "w1"], ["y"])],
        opsets=[helper.make_opsetid("ai.onnx.ml", 3)],
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"version 1 of ai\.onnx\.ml and the model version 3"):
        fused(before, other)


REFUSED = {
    "another type": (
        front([node("Cast", ["x"], ["scaled"], to=11)], types={"scaled": 11}),
        r"'scaled' of pre\.onnx is float64 of shape \(-1, 5\), and input 'x' of the model takes "
        r"float32",
    ),
    "another shape": (
        front([node("MatMul", ["x", "w1"], ["scaled"])], shapes={"scaled": ["N", 6]}),
        r"of shape \(-1, 6\), and input 'x' of the model takes float32 of shape \(-1, 5\)",
    ),
    "another rank": (
        front([node("Unsqueeze", ["x", "one"], ["scaled"])], shapes={"scaled": ["N", 1, D]},
              extra={"one": np.array([1])}),
        "of shape",
    ),
    "outputs that nothing takes": (
        front(outputs=("h", "scaled")),
        r"output 'h' of pre\.onnx is no input of the model, which takes x; give them the same",
    ),
    "an input called as an output of the model": (
        front([node("Sub", ["y", "mean"], ["scaled"])], inputs=[("y", 1, ["N", D])]),
        "input 'y' of pre.onnx is the name of an input or output of the model too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(what):
    before, why = REFUSED[what]
    with pytest.raises(ModelError, match=why):
        fused(before, classifier())
