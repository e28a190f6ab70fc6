"""Tables as Arrow streams, for the tests that send them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa

from service.media import ARROW
from tests.factory import rows

ROWS = 7
X = rows("classification", ROWS, 5)[0]


def stream(table, batch=None, **options):
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue()


def read(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(answer.content).read_all()
    table.validate(full=True)
    return table


def post(server, body, path="/v1/predict", **headers):
    return server.client.post(path, content=body, headers={"content-type": ARROW, **headers})


def columns(values=X, **more):
    return pa.table({**dict(zip("abcd", values.T, strict=True)), **more})


def lists(kind):
    return pa.table({"x": pa.array(X.tolist(), kind)})


def second(values, batch=None):
    """A stream whose column b has other values."""
    return stream(columns().set_column(1, "b", pa.array(values)), batch)


TABLES = {
    "columns": columns(),
    "float64": columns(X.astype(np.float64)),
    "dictionary": pa.table(
        {c: pa.array(X[:, k]).dictionary_encode() for k, c in enumerate("abcd")}),
    "other order, and columns that are not used": columns(target=["a"] * ROWS).select(list("dcba"))
    .append_column("target", pa.array([{"odd": 1}] * ROWS)),
    "list": lists(pa.list_(pa.float32())),
    "large list": lists(pa.large_list(pa.float32())),
    "fixed-size list": lists(pa.list_(pa.float32(), 4)),
    "nested list": pa.table({"x": pa.array(X.reshape(ROWS, 2, 2).tolist(),
                                           pa.list_(pa.list_(pa.float32(), 2)))}),
    "tensor": pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(X)}),
}  # fmt: skip
