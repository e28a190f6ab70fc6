"""Labels over HTTP: found by their predictions, refused where they cannot be right."""

from __future__ import annotations

import re

import numpy as np
import orjson
import pytest

from tests.factory import CLASSES, rows
from tests.service.helpers import as_rows, poll


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
