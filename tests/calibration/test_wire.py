"""external_data against the protobuf library's own reading of the same bytes."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import onnx
import pytest
from google.protobuf.message import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calibration.wire import external_data
from posthoc.contract import BundleError


def tensor(name: str, location: str | None) -> TensorProto:
    t = numpy_helper.from_array(np.ones((2, 2), np.float32), name)
    if location is not None:
        t.ClearField("raw_data")
        t.data_location = TensorProto.EXTERNAL
        for key, value in (("offset", "0"), ("location", location)):
            entry = t.external_data.add()
            entry.key, entry.value = key, value
    return t


def branch(name: str, location: str | None) -> onnx.GraphProto:
    node = helper.make_node("Constant", [], [name], value=tensor("c", location))
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, 1, [2, 2])])


def model(*, initializer=None, then=None, other=None, sparse=None, function=None, listed=None):
    nodes = [
        helper.make_node(
            "If", ["b"], ["i"], then_branch=branch("t", then), else_branch=branch("e", other)
        ),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Custom", ["m"], ["n"], domain="d", values=[tensor("l", listed)]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", 1, ["N", 2]),
            helper.make_tensor_value_info("b", 9, []),
        ],
        [helper.make_tensor_value_info("n", 1, None)],
        [tensor("w", initializer)],
    )
    s = graph.sparse_initializer.add()
    s.values.CopyFrom(tensor("s", sparse))
    s.indices.CopyFrom(numpy_helper.from_array(np.zeros(4, np.int64), "si"))
    f = helper.make_function(
        "d",
        "F",
        [],
        ["o"],
        [helper.make_node("Constant", [], ["o"], value=tensor("f", function))],
        [helper.make_opsetid("", 20)],
    )
    return helper.make_model(graph, functions=[f], ir_version=10)


def tensors(message: Message) -> Iterator[TensorProto]:
    """Every TensorProto anywhere below a message, by reflection over its set fields."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                yield from tensors(child)


def by_protobuf(data: bytes) -> list[str]:
    found = []
    for t in tensors(onnx.ModelProto.FromString(data)):
        if t.data_location == TensorProto.EXTERNAL or t.external_data:
            entries = [e.value for e in t.external_data if e.key == "location"]
            found.append(entries[-1] if entries else "")
    return found


@pytest.mark.parametrize("place", ["initializer", "then", "other", "sparse", "function", "listed"])
def test_finds_a_tensor_wherever_it_can_lie(place):
    data = model(**{place: "../secret.bin"}).SerializeToString()
    assert external_data(data) == ["../secret.bin"]


def test_names_every_location_in_file_order():
    data = model(initializer="a", then="b", other="b", listed="c").SerializeToString()
    assert sorted(external_data(data)) == ["a", "b", "b", "c"]


def test_a_model_without_external_data():
    assert external_data(model().SerializeToString()) == []
    assert external_data(b"") == []


def test_external_without_a_location_is_still_external():
    m = model()
    m.graph.initializer[0].data_location = TensorProto.EXTERNAL
    assert external_data(m.SerializeToString()) == [""]


def test_an_enum_keeps_its_low_32_bits():
    plain = model().SerializeToString()
    t = TensorProto(data_location=TensorProto.EXTERNAL)
    assert t.SerializeToString() == b"\x70\x01"
    long = b"\x70\x81\x80\x80\x80\x10"  # 2**32 + 1
    assert TensorProto.FromString(long).data_location == TensorProto.EXTERNAL
    graph = b"\x2a" + bytes([len(long)]) + long
    assert external_data(plain + b"\x3a" + bytes([len(graph)]) + graph) == [""]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x3a\x05\x00", "ends after its message"),
        (b"\x3a", "cut off"),
        (b"\x3a\xff\xff", "cut off"),
        (b"\x00\x01", "field number 0"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x38\x01", "not a message"),
        (b"\x08" + b"\xff" * 10, "longer than 10 bytes"),
        (b"\x0d\x00", "ends after its message"),
        (b"\x18\x00\x00\x00ORTM\x00\x00", "ORT format"),
    ],
)
def test_malformed_bytes_say_why(data, why):
    with pytest.raises(BundleError, match=why):
        external_data(data)


def test_deep_nesting_needs_no_recursion():
    def wrapped(tag: int, body: bytes) -> bytes:
        size, out = len(body), bytearray([tag])
        while size > 0x7F:
            out.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([*out, size]) + body

    graph = wrapped(0x2A, b"\x70\x01")  # an external initializer
    for _ in range(3_000):
        graph = wrapped(0x0A, wrapped(0x2A, wrapped(0x32, graph)))  # node.attribute.g
    assert external_data(wrapped(0x3A, graph)) == [""]


def test_a_truncated_model_is_refused_or_holds_less():
    data = model(initializer="a", then="b", function="c").SerializeToString()
    whole = external_data(data)
    for end in range(len(data)):
        with suppress(BundleError):
            assert set(external_data(data[:end])) <= {*whole, ""}


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_bundle_error(data):
    with suppress(BundleError):
        assert all(isinstance(x, str) for x in external_data(data))


VALID = model(initializer="a", then="b", sparse="s", function="c").SerializeToString()


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3),
    st.integers(0, len(VALID)),
)
@example([], len(VALID))
def test_whatever_protobuf_reads_as_external_is_found_or_refused(changes, end):
    data = bytearray(VALID)
    for at, byte in changes:
        data[at] = byte
    changed = bytes(data[:end])
    try:
        want = by_protobuf(changed)
    except Exception:  # not protobuf at all
        return
    try:
        got = external_data(changed)
    except BundleError:
        return
    assert len(got) >= len(want)
    assert set(want) <= {*got, ""}
