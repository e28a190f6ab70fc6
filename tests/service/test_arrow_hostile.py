"""Arrow streams that mean harm: each is refused by name, cheaply, and the server answers on."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import arrow, ipc
from service.errors import ServiceError
from service.models import load_model
from tests.service.helpers import healthy
from tests.service.tables import ROWS, TABLES, X, columns, post, second, stream


@pytest.fixture(scope="module")
def server(served):
    return served(max_rows=100, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def model(classifier):
    return load_model(classifier, device="cpu", threads=1)


def told(**metadata):
    return stream(columns().replace_schema_metadata(metadata))


def other_endian():
    """The stream, its schema's byte order made to be read from somewhere else in the table."""
    body = bytearray(stream(columns()))
    message = 8 + struct.unpack_from("<I", body, 8)[0]
    at = message + ipc._offset(bytes(body), message, 2)
    schema = at + struct.unpack_from("<I", body, at)[0]
    fields = schema - struct.unpack_from("<i", body, schema)[0]
    struct.pack_into("<H", body, fields + 4, struct.unpack_from("<H", body, fields + 6)[0])
    return bytes(body)


def repeated(times):
    sink = io.BytesIO()
    empty = columns().to_batches()[0].slice(0, 0)
    with pa.ipc.new_stream(sink, empty.schema) as writer:
        for _ in range(times):
            writer.write_batch(empty)
    return sink.getvalue()


def grown():
    sink = io.BytesIO()
    table = columns(id=pa.DictionaryArray.from_arrays(range(ROWS), list("tuvwxyz")))
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    more = columns(id=pa.DictionaryArray.from_arrays(range(ROWS), list("tuvwxyzä")))
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
        writer.write_table(more)
    return sink.getvalue()


def wide_texts():
    """Many rows that show the same text of 128 KiB, in dictionaries and in views."""
    long = pa.array(["x" * (1 << 17), "y" * (1 << 17)])
    seen = pa.DictionaryArray.from_arrays(np.zeros(100, np.int8), long)
    _, views, texts = long.cast(pa.string_view()).buffers()
    views = pa.py_buffer(views.to_pybytes()[:16] * 100)
    view = pa.Array.from_buffers(pa.string_view(), 100, [None, views, texts])
    zeros = np.zeros((100, 4), np.float32)
    return [stream(columns(zeros, id=ids)) for ids in (seen, view)]


def file_format():
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, columns().schema) as writer:
        writer.write_table(columns())
    return sink.getvalue()


NESTED = pa.array([1.0] * ROWS)
for _ in range(20):
    NESTED = pa.FixedSizeListArray.from_arrays(NESTED, 1)
HOSTILE = {
    "nothing": (b"", "no Arrow IPC stream"),
    "garbage": (b"\x00garbage" * 9, "no Arrow IPC stream"),
    "json": (b'{"rows": []}', "no Arrow IPC stream"),
    "file format": (file_format(), "the file format is another one"),
    "cut": (stream(columns())[:-30], "no Arrow IPC stream"),
    "more behind": (stream(columns()) + b"12345678", "8 bytes follow the end"),
    "two streams": (stream(columns()) * 2, "bytes follow the end"),
    "compressed": (stream(columns(), compression="zstd"), "is compressed"),
    "lz4": (stream(columns(), compression="lz4"), "is compressed"),
    "delta dictionary": (grown(), "delta dictionary"),
    "big-endian": (other_endian(), "big-endian"),
    "many columns": (stream(pa.table({f"c{k}": [1] for k in range(2500)})), "a header of .* most"),
    "many messages": (repeated(17_000), "more than 16384 messages"),
    "no rows": (stream(columns(X[:0])), "no row"),
    "empty batches": (repeated(3), "no row"),
    "too many rows": (stream(columns(np.zeros((101, 4), np.float32)), 10), "101 rows"),
    "unknown column": (stream(columns(e=X[:, 0])), "column 'e', which the model does not take"),
    "missing column": (stream(columns().drop_columns(["c"])), "no column 'c'"),
    "no column": (stream(pa.table({})), "no column 'a'"),
    "one name twice": (
        stream(pa.table([X[:, k] for k in (0, 1, 2, 3, 3)], names=[*"abcdd"])), "one name"),
    "both forms": (stream(columns(x=X.tolist())), "both 'x' and the columns"),
    "text": (second(["x"] * ROWS), "column 'b' holds string"),
    "dates": (second(pa.array(range(ROWS), pa.date32())), "column 'b' holds date32"),
    "structs": (second([{"a": 1}] * ROWS), "column 'b' holds struct"),
    "nulls": (second(pa.nulls(ROWS)), "column 'b' holds null"),
    "runs": (second(pa.RunEndEncodedArray.from_arrays([ROWS], [1.0])), "holds run_end"),
    "names that are no text": (
        stream(columns(eeee=X[:, 0])).replace(b"eeee", b"\x80eee"), "no Arrow IPC stream: .*utf-8"),
    "deep": (second(NESTED), "column 'b' holds fixed_size_list"),
    "dictionary of lists": (
        second(pa.DictionaryArray.from_arrays([0] * ROWS, [[1.0] * 9])), "'b' holds"),
    "null": (second([1.0, 2.0, None, *[0.0] * 4], batch=2), "row 2, column 'b' is null"),
    "not finite": (second([1.0, np.nan, *[0.0] * 5]), "row 1 .* is not finite"),
    "overflow": (second([1.0, 1e300, *[0.0] * 5]), "row 1 .* is not finite"),
    "lists side by side": (second([[1.0, 2.0]] * ROWS), "of one shape"),
    "ragged": (stream(pa.table({"x": [*X[:6].tolist(), [1.0]]})), "row 6, column 'x' is empty, or"),
    "null in a list": (
        stream(pa.table({"x": [*X[:6].tolist(), [1.0, None, 1.0, 1.0]]})), "row 6, .* is null"),
    "null list": (stream(pa.table({"x": [*X[:3].tolist(), None]})), "row 3, column 'x' is null"),
    "empty lists": (stream(pa.table({"x": pa.array([[]] * 9, pa.list_(pa.float32()))})), "row 0,"),
    "lists of no size": (
        stream(pa.table({"x": pa.array([[]] * 9, pa.list_(pa.float32(), 0))})), "row 0, .* empty"),
    "ragged batches": (stream(pa.table({"x": [[1.0] * 4] * 2 + [[1.0]]}), 2), "row 2, .*shaped"),
    "another length": (stream(pa.table({"x": [[1.0] * 3] * 2})), "hold 3 values a row; input 'x'"),
    "id null": (stream(columns(id=[*"abcdef", None])), "row 6, column 'id' is null"),
    "id twice": (stream(columns(id=[*"abcdef", "a"])), "more than one row"),
    "bad id": (stream(columns(id=["a b"] * ROWS)), "'a b'"),
    "ids that are numbers with a point": (stream(columns(id=X[:, 0])), "'id' holds float"),
    "wide dictionary": (wide_texts()[0], "id 'x{100}…' is not 1 to 128"),
    "wide views": (wide_texts()[1], "take more than the body's"),
    "alpha": (told(alpha="1.5"), "alpha"),
    "alpha no JSON": (told(alpha="x"), "'alpha' is not JSON"),
    "unknown output": (
        told(outputs='["speed"]'), "no output 'speed'"),
    "id no text": (told(id=b"\xff"), "is not 1 to 128"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_refusals_name_the_problem_and_the_server_answers_on(server, name):
    body, says = HOSTILE[name]
    assert len(body) <= 1 << 20 or name == "many messages"
    if len(body) > 1 << 20:
        with pytest.raises(ServiceError, match=says):
            ipc.read_schema(body, 4)
        return
    answer = post(server, body)
    assert answer.status_code == 400, answer.text
    assert re.search(says, answer.json()["error"]["message"]), answer.text
    assert healthy(server)


def test_a_small_stream_makes_no_large_memory(model):
    """Texts that many rows share, and single bits that become numbers."""
    for body in wide_texts():
        tracemalloc.start()
        with pytest.raises(ServiceError):
            request = arrow.parse_predict(body, model, 100, 1 << 20)
            arrow.pa.array(request.ids)  # a list of one text, over and over
            raise ServiceError(400, "refused", "its ids are too long")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
    bits = pa.table({"x": pa.array(np.zeros((50, 4), bool).tolist(), pa.list_(pa.bool_(), 4))})
    assert arrow.parse_predict(stream(bits), model, 50, 200).inputs["x"].shape == (50, 4)
    with pytest.raises(ServiceError, match="more than 199 values") as refused:
        arrow.parse_predict(stream(bits), model, 50, 199)
    assert refused.value.status == 413


def damaged(examples):
    bodies = [stream(TABLES[name], 3) for name in TABLES] + [stream(columns(id=[*"abcdefg"]), 2)]

    @settings(deadline=None, derandomize=True, max_examples=examples)
    @given(
        st.sampled_from(bodies),
        st.lists(
            st.tuples(st.floats(0, 1), st.sampled_from("xowid"), st.integers(0, 255)),
            min_size=1,
            max_size=6,
        ),
    )
    def check(model, body, edits):
        body = bytearray(body)
        for where, how, value in edits:
            at = min(int(where * len(body)), len(body) - 1)
            if how == "x":
                body[at] = value
            elif how == "o":
                body[at] ^= 1 << value % 8
            elif how == "w":  # a size or an offset, at the ends of its range
                at -= at % 4
                body[at : at + 4] = [b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0"][value % 3]
            elif how == "i":
                body[at:at] = bytes([value] * 8)
            else:
                del body[at : at + 8]
            if not body:
                return
        try:
            request = arrow.parse_predict(bytes(body), model, 100, 1 << 20)
        except ServiceError as e:
            assert e.status in (400, 413)
        else:
            assert request.inputs["x"].dtype == np.float32

    return check


def test_damaged_streams_are_requests_or_400(model):
    damaged(500)(model)


@pytest.mark.long
def test_many_damaged_streams_are_requests_or_400(model):
    damaged(20_000)(model)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xff\xff\xff", stream(columns())[:200]])
)
def test_any_bytes_are_refused(model, tail, head):
    with pytest.raises(ServiceError) as refused:
        arrow.parse_predict(head + tail, model, 100, 1 << 20)
    assert refused.value.status == 400
