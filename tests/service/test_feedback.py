"""Labels over HTTP: found by their predictions, refused where they cannot be right."""

from __future__ import annotations

import io
import re

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.media import ARROW, PARQUET
from tests.factory import CLASSES, COLUMNS, rows
from tests.service.helpers import as_rows, healthy, poll


@pytest.fixture(scope="module")
def server(served):
    return served()


def test_labels_find_their_predictions(served):
    server = served()
    x, y = rows("classification", 60, 9)
    got = server.client.post("/v1/predict", json={"rows": as_rows(x), "id": "batch"}).json()
    right = [p["label"] == CLASSES[t] for p, t in zip(got["predictions"], y, strict=True)]

    def label(k, value):
        return server.client.post("/v1/labels", json={"id": f"batch:{k}", "label": value})

    poll(
        lambda: server.client.get("/v1/calibration").json(),
        lambda c: c["models"][0]["served"] == 60,
    )
    first = label(0, int(y[0]))
    assert first.json()["results"] == [{"id": "batch:0", "result": "accepted"}]
    assert label(0, CLASSES[y[0]]).json()["counts"] == {"duplicate": 1}
    conflict = label(0, int((y[0] + 1) % 3))
    assert conflict.status_code == 409
    assert conflict.json()["counts"] == {"conflict": 1}
    assert label("nobody", 0).status_code == 202
    lines = b"\n".join(
        orjson.dumps({"id": f"batch:{k}", "label": CLASSES[y[k]], "model": "tiny"})
        for k in range(1, 60)
    )
    bulk = server.client.post(
        "/v1/labels", content=lines, headers={"content-type": "application/x-ndjson"}
    )
    assert bulk.json()["counts"] == {"accepted": 59}

    def live():
        (model,) = server.client.get("/v1/calibration").json()["models"]
        return model

    model = poll(live, lambda m: m["labelled"] == 60)
    assert model["accuracy"] == pytest.approx(np.mean(right))
    covered = [CLASSES[t] in p["set"] for p, t in zip(got["predictions"], y, strict=True)]
    assert model["coverage"]["0.9"]["coverage"] == pytest.approx(np.mean(covered))
    text = server.client.get("/metrics").text
    metrics = re.findall(r'^uq_labeled_correct_total\{.*model="tiny".*\} (\S+)$', text, re.M)
    assert sum(map(float, metrics)) >= sum(right)
    gone = server.client.delete("/v1/predictions/batch:0")
    assert gone.status_code == 200
    assert live()["labelled"] == 59


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"id": "a"}, "'label' is missing"),
        ({"label": 1}, "'id'"),
        ({"id": "a b", "label": 1}, "'id'"),
        ({"id": "a", "label": 3}, "3"),
        ({"id": "a", "label": True}, "True"),
        ({"id": "a", "label": "z"}, "'z'"),
        ({"id": "a", "label": None}, "None"),
        ({"id": "a", "label": 1, "weight": 2}, "'weight'"),
        ([{"id": "a", "label": 1}, 5], "label 1 is a JSON number"),
        ([], "no label"),
    ],
)
def test_labels_that_cannot_be_right(server, body, says):
    answer = server.client.post("/v1/labels", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def parquet(columns, **options):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def arrow(columns, batch=7, **options):
    sink = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue()


def send(server, body, media_type):
    return server.client.post("/v1/labels", content=body, headers={"content-type": media_type})


def test_every_form_of_the_same_labels_is_the_same(server):
    x, y = rows("classification", 40, 3)
    server.client.post("/v1/predict", json={"rows": as_rows(x), "id": "form"})
    ids, names = [f"form:{k}" for k in range(40)], [CLASSES[t] for t in y]
    poll(
        lambda: server.client.get("/v1/calibration").json(),
        lambda c: c["models"][0]["served"] >= 40,
    )
    first = send(server, parquet({"id": ids, "label": y.tolist(), "model": ["tiny"] * 40}), PARQUET)
    assert first.json()["counts"] == {"accepted": 40}
    assert [r["id"] for r in first.json()["results"]] == ids
    for label in (
        pa.array(names),
        pa.array(names).dictionary_encode(),
        pa.array(y, pa.int8()),
        pa.array(y, pa.float64()),
    ):
        for make, media_type in ((parquet, PARQUET), (arrow, ARROW)):
            found = send(server, make({"id": ids, "label": label}), media_type)
            assert found.json()["counts"] == {"duplicate": 40}, (label.type, media_type)
    for codec in ("none", "gzip", "zstd"):
        body = parquet({"label": names, "id": ids}, compression=codec)
        assert send(server, body, PARQUET).json()["counts"] == {"duplicate": 40}
    mixed = parquet({"id": ["form:0", "form:0", "later"], "label": [int(y[0]), 7, 1]})
    answer = send(server, mixed, PARQUET)
    assert answer.status_code == 202
    assert answer.json()["counts"] == {"duplicate": 1, "invalid": 1, "pending": 1}


def test_lists_of_numbers_are_labels_of_a_regressor(served):
    server = served("regression")
    x, y = rows("regression", 5, 3)
    server.client.post("/v1/predict", json={"rows": as_rows(x, COLUMNS["regression"]), "id": "r"})
    poll(
        lambda: server.client.get("/v1/calibration").json(),
        lambda c: c["models"][0]["served"] == 5,
    )
    values = np.asarray(y, float).reshape(-1, 1)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 1)
    ids = [f"r:{k}" for k in range(5)]
    assert send(server, arrow({"id": ids, "label": fixed}), ARROW).json()["counts"] == {
        "accepted": 5
    }
    for label in (values.tolist(), values.ravel()):
        found = send(server, parquet({"id": ids, "label": label}), PARQUET)
        assert found.json()["counts"] == {"duplicate": 5}


@pytest.mark.parametrize(
    ("columns", "status", "says"),
    [
        ({"id": ["a"]}, 400, "no column 'label'"),
        ({"label": [1]}, 400, "no column 'id'"),
        ({"id": ["a"], "label": [1], "weight": [2]}, 400, "'weight'"),
        ({"id": ["a"], "label": [True]}, 400, "labels holds bool"),
        ({"id": ["a"], "label": [[["x"]]]}, 400, "labels holds list"),
        ({"id": [0.5], "label": [1]}, 400, "ids holds double"),
        ({"id": ["a"], "label": [1], "model": [3]}, 400, "models holds int64"),
        ({"id": ["a b"], "label": [1]}, 400, "'id'"),
        ({"id": [None], "label": [1]}, 400, "'id'"),
        ({"id": ["a", "b"], "label": [1, None]}, 400, "label 1: 'label' is missing"),
        ({"id": ["a"], "label": [1], "model": ["none"]}, 404, "none"),
        ({"id": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, 400, "no label"),
        ({"id": ["a"] * 100_001, "label": [1] * 100_001}, 413, "100001 labels"),
    ],
)
def test_tables_that_cannot_be_right(server, columns, status, says):
    for make, media_type in ((parquet, PARQUET), (lambda c: arrow(c, 1 << 20), ARROW)):
        answer = send(server, make(columns), media_type)
        assert answer.status_code == status, answer.text
        if columns.get("id") != [None]:
            assert says in answer.json()["error"]["message"]


def test_little_that_unpacks_to_much_is_refused(server):
    many = 90_000
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(many, np.int32)), ["x" * 100_000])
    wide = pa.array([[0.0] * 10_000_000])
    one = pa.array(["a"])
    for columns in (
        {"id": long, "label": pa.array(np.zeros(many))},
        {"id": one, "label": wide},
    ):
        body = parquet(columns)
        assert len(body) < 1 << 20
        answer = send(server, body, PARQUET)
        assert answer.status_code == 413, answer.text
    body = arrow({"id": long, "label": pa.array(np.zeros(many))}, many)
    assert send(server, body, ARROW).status_code == 413
    assert healthy(server)


def test_damaged_tables_never_hurt(server):
    rng = np.random.default_rng(0)
    columns = {"id": [f"z{k}" for k in range(50)], "label": list("abc" * 16 + "ab")}
    for whole, media_type in ((parquet(columns), PARQUET), (arrow(columns), ARROW)):
        for _ in range(150):
            body = bytearray(whole)
            if rng.random() < 0.3:
                del body[rng.integers(len(body)) :]
            for at in rng.integers(len(body), size=rng.integers(1, 6)) if body else ():
                body[at] = rng.integers(256)
            assert send(server, bytes(body), media_type).status_code < 500
    assert healthy(server)
