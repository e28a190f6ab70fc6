"""The Open Inference Protocol's codec against hand-written messages and a stock client's codec."""

from __future__ import annotations

import json
import math

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.http._utils import _get_inference_request

from posthoc.contract import TensorSpec
from service.errors import ServiceError
from service.protocol import DATATYPES, encode_infer, has_datatype, parse_infer

SPECS = (TensorSpec(name="x", dtype="float32", shape=(-1, 2)),)
ROWS = np.array([[1.5, -2.0], [3.25, 0.0], [7.0, 1e-3]], np.float32)
quick = settings(deadline=None, derandomize=True, max_examples=200)


def message(**changes):
    entry = {"name": "x", "datatype": "FP32", "shape": [3, 2], "data": ROWS.ravel().tolist()}
    entry.update(changes)
    return {"inputs": [{k: v for k, v in entry.items() if v is not None}]}


def parse(request, tail=b"", specs=SPECS):
    head = orjson.dumps(request)
    return parse_infer(head + tail, str(len(head)) if tail else None, specs)


def test_flat_and_nested_data_are_the_same():
    flat = parse(message()).inputs["x"]
    nested = parse(message(data=ROWS.tolist())).inputs["x"]
    np.testing.assert_array_equal(flat, ROWS)
    np.testing.assert_array_equal(nested, ROWS)
    assert flat.dtype == nested.dtype == np.float32


def test_envelope():
    request = {
        "id": "r-1",
        "parameters": {"alpha": 0.05, "binary_data_output": True, "priority": 3},
        "outputs": [{"name": "label"}, {"name": "probs", "parameters": {"binary_data": False}}],
        **message(),
    }
    parsed = parse(request)
    assert (parsed.id, parsed.alpha, parsed.binary) == ("r-1", 0.05, True)
    assert parsed.outputs == {"label": True, "probs": False}
    assert parse(message()).outputs is None


@pytest.mark.parametrize("name", [n for n in DATATYPES if n != "BOOL"])
@pytest.mark.parametrize("binary", [False, True])
def test_what_a_stock_client_sends_is_read(name, binary):
    dtype = DATATYPES[name]
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values = np.array([[limits.min, 0], [1, limits.max]], dtype)
    tensor = InferInput("x", [2, 2], name)
    tensor.set_data_from_numpy(values, binary_data=binary)
    body, length = _get_inference_request(
        [tensor],
        "abc",
        [InferRequestedOutput("label", binary_data=binary)],
        0,
        False,
        False,
        0,
        None,
        None,
    )
    parsed = parse_infer(bytes(body), None if length is None else str(length), SPECS)
    assert parsed.id == "abc"
    assert parsed.inputs["x"].dtype == dtype
    np.testing.assert_array_equal(parsed.inputs["x"], values)
    assert parsed.outputs == {"label": binary}


@pytest.mark.parametrize("binary", [False, True])
def test_texts_are_refused_by_name(binary):
    tensor = InferInput("x", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([b"one", b"two"], object), binary_data=binary)
    body, length = _get_inference_request([tensor], "", None, 0, False, False, 0, None, None)
    with pytest.raises(ServiceError, match="input 'x': BYTES are texts, and models here take num"):
        parse_infer(bytes(body), None if length is None else str(length), SPECS)


def test_booleans():
    json_form = message(datatype="BOOL", shape=[2], data=[True, False])
    np.testing.assert_array_equal(parse(json_form).inputs["x"], [True, False])
    binary = message(datatype="BOOL", shape=[2], data=None, parameters={"binary_data_size": 2})
    np.testing.assert_array_equal(parse(binary, b"\x01\x00").inputs["x"], [True, False])
    with pytest.raises(ServiceError, match="0 or 1"):
        parse(binary, b"\x01\x07")


def test_several_binary_inputs_follow_each_other():
    a, b = np.arange(4, dtype="<i8"), np.arange(3, dtype="<f8")
    request = {
        "inputs": [
            {
                "name": "a",
                "datatype": "INT64",
                "shape": [2, 2],
                "parameters": {"binary_data_size": 32},
            },
            {"name": "j", "datatype": "FP32", "shape": [1], "data": [0.5]},
            {"name": "b", "datatype": "FP64", "shape": [3], "parameters": {"binary_data_size": 24}},
        ]
    }
    inputs = parse(request, a.tobytes() + b.tobytes()).inputs
    np.testing.assert_array_equal(inputs["a"], a.reshape(2, 2))
    np.testing.assert_array_equal(inputs["b"], b)
    assert inputs["j"][0] == 0.5


def test_raw_form():
    parsed = parse_infer(ROWS.tobytes(), "0", SPECS)
    np.testing.assert_array_equal(parsed.inputs["x"], ROWS)
    assert parsed.binary
    with pytest.raises(ServiceError, match="rows of 8 bytes"):
        parse_infer(b"12345", "0", SPECS)
    with pytest.raises(ServiceError, match="one input"):
        parse_infer(ROWS.tobytes(), "0", SPECS * 2)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"[1]", "array"),
        (b"null", "null"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', "not JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1e999]}]}', "not JSON"),
        (b'{"inputs":' + b"[" * 100_000, "depth"),
        (b"{}", "'inputs'"),
        (b'{"inputs":[]}', "'inputs'"),
        (b'{"inputs":[7]}', "'name'"),
        (orjson.dumps(message(datatype="BYTES", data=["a"] * 6)), "'x': BYTES are texts"),
        (orjson.dumps(message(datatype="fp32")), "fp32"),
        (orjson.dumps(message(shape=[3])), r"shape \[6\] does not fill shape \[3\]"),
        (orjson.dumps(message(shape=[-3, -2])), "'shape'"),
        (orjson.dumps(message(shape=[True, 6])), "'shape'"),
        (orjson.dumps(message(shape=[3.0, 2])), "'shape'"),
        (orjson.dumps(message(shape="3,2")), "'shape'"),
        (orjson.dumps(message(shape=[1 << 39])), "does not fill"),
        (orjson.dumps(message(shape=[1 << 39, 1 << 39])), "'shape'"),
        (orjson.dumps(message(shape=[0, 1 << 39, 1 << 39], data=[])), "'shape'"),
        (orjson.dumps(message(shape=[0, 1 << 62], data=[])), "'shape'"),
        (orjson.dumps(message(shape=[1] * 17)), "'shape'"),
        (orjson.dumps(message(data=ROWS.T.tolist())), "does not fill"),
        (orjson.dumps(message(data=[[1, 2], [3]])), "ragged"),
        (orjson.dumps(message(data=[1, [2]])), "ragged"),
        (orjson.dumps(message(data=["1", "2", "3", "4", "5", "6"])), "string"),
        (orjson.dumps(message(data=[1, 2, 3, 4, 5, True])), "boolean"),
        (orjson.dumps(message(data=[1, 2, 3, 4, 5, None])), "null"),
        (orjson.dumps(message(data={"a": 1})), "must be a list"),
        (orjson.dumps(message(data=None)), "neither"),
        (orjson.dumps(message(datatype="UINT8")), "row 0 of .* does not fit uint8"),
        (orjson.dumps(message(datatype="BOOL")), "numbers"),
        (orjson.dumps(message(data=None, parameters={"binary_data_size": 24})), "was not sent"),
        (orjson.dumps(message(parameters=[])), "'parameters'"),
        (orjson.dumps({"id": 3, **message()}), "'id'"),
        (orjson.dumps({"inputs": message()["inputs"] * 2}), "twice"),
        (orjson.dumps({"parameters": {"alpha": "0.1"}, **message()}), "alpha"),
        (orjson.dumps({"parameters": {"binary_data_output": 1}, **message()}), "true or false"),
        (orjson.dumps({"outputs": [{"name": "a"}, {"name": "a"}], **message()}), "twice"),
        (orjson.dumps({"outputs": {}, **message()}), "'outputs'"),
    ],
)
def test_refusals_name_the_part(body, says):
    with pytest.raises(ServiceError, match=says) as caught:
        parse_infer(body, None, SPECS)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("size", "tail", "says"),
    [
        (23, ROWS.tobytes()[:23], "takes 24"),
        (24, ROWS.tobytes()[:20], "does not fit"),
        (24, ROWS.tobytes() + b"x", "add up to 24"),
        (-1, ROWS.tobytes(), "does not fit"),
        (True, ROWS.tobytes(), "does not fit"),
        (24.0, ROWS.tobytes(), "does not fit"),
        (None, ROWS.tobytes(), "neither"),
    ],
)
def test_binary_sizes_must_sum_to_the_body(size, tail, says):
    with pytest.raises(ServiceError, match=says):
        parse(message(data=None, parameters={"binary_data_size": size}), tail)


@pytest.mark.parametrize("header", ["-1", "+5", "5.0", "٣", "", "9" * 40, "999999"])
def test_header_length_must_lie_in_the_body(header):
    with pytest.raises(ServiceError, match="Inference-Header-Content-Length"):
        parse_infer(orjson.dumps(message()), header, SPECS)


@quick
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 210).map(str)))
def test_any_bytes_are_a_request_or_a_400(body, header):
    try:
        parse_infer(body, header, SPECS)
    except ServiceError as e:
        assert e.status == 400


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y"]) | json_values,
        "datatype": st.sampled_from(sorted(DATATYPES)) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.just(1 << 39), max_size=3) | json_values,
        "data": st.lists(st.integers(-3, 300) | st.floats(-1, 1), max_size=8) | json_values,
        "parameters": st.dictionaries(st.just("binary_data_size"), st.integers(-1, 40))
        | json_values,
    },
)


@quick
@given(st.lists(entries, max_size=3), st.binary(max_size=40), json_values, json_values)
def test_any_message_is_a_request_or_a_400(inputs, tail, outputs, parameters):
    head = orjson.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters})
    try:
        parsed = parse_infer(head + tail, str(len(head)), SPECS)
    except ServiceError as e:
        assert e.status == 400
        assert len(e.message) < 1000
    else:
        assert all(isinstance(a, np.ndarray) for a in parsed.inputs.values())


class Response:
    """What tritonclient's result class wants of an HTTP response."""

    def __init__(self, body, length):
        self.body, self.length = body, length

    def get(self, name):
        return {"Inference-Header-Content-Length": self.length}.get(name)

    def read(self, length=-1):
        head, self.body = (
            (self.body, b"")
            if length == -1
            else (
                self.body[:length],
                self.body[length:],
            )
        )
        return head


@quick
@given(
    st.sampled_from(sorted(DATATYPES)),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_stock_client_reads_what_is_written(name, shape, binary, seed):
    rng = np.random.default_rng(seed)
    value = rng.integers(0, 256, math.prod(shape) * 8, np.uint8).view(np.uint64)
    value = (value % 200).astype(DATATYPES[name]).reshape(shape)
    other = np.arange(3, dtype=np.int64)
    body, length = encode_infer(
        "m", "1", "id-1", {"first": value, "second": other}, {"first": binary, "second": not binary}
    )
    result = InferResult(Response(body, str(length)), False)
    np.testing.assert_array_equal(result.as_numpy("first"), value)
    np.testing.assert_array_equal(result.as_numpy("second"), other)
    assert result.get_response()["id"] == "id-1"
    assert result.get_response()["model_version"] == "1"


def test_json_out_is_strict_and_shortest():
    value = np.array([[np.inf, 0.1], [-np.inf, np.nan]], np.float32)
    body, length = encode_infer("m", "1", "i", {"upper": value})
    assert length is None
    assert json.loads(body, parse_constant=pytest.fail)["outputs"][0] == {
        "name": "upper",
        "datatype": "FP32",
        "shape": [2, 2],
        "data": [None, 0.1, None, None],
    }


def test_big_endian_and_strided_arrays_leave_as_little_endian_rows():
    value = np.arange(6, dtype=">i4").reshape(2, 3)[:, ::2]
    body, length = encode_infer("m", "1", "i", {"v": value}, True)
    assert body[length:] == np.array([0, 2, 3, 5], "<i4").tobytes()
    assert orjson.loads(encode_infer("m", "1", "i", {"v": value})[0])["outputs"][0]["data"] == [
        0,
        2,
        3,
        5,
    ]


def test_datatypes_that_cannot_be_carried():
    assert has_datatype("float16")
    assert not has_datatype("str")
    assert not has_datatype("bfloat16")
