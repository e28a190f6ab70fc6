"""Labels of a name that was switched between rows and maps: they count under what predicted."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.bundles import write_active
from service.media import PARQUET
from service.settings import Settings
from tests.factory import CLASSES, rows, version_of
from tests.service.conftest import Server
from tests.service.helpers import poll
from tests.service.maps import images
from tests.service.streams import Exposition

N = 12
X, Y = rows("classification", N, 3)


@pytest.fixture
def server(classifier, maps_root, tmp_path, root):
    version_of(classifier, root, "m", "rows")
    version_of(maps_root / "segmenter" / "1", root, "m", "maps")
    with Server(Settings(bundles=root, data_dir=tmp_path / "data", poll_s=0.05)) as running:
        yield running


@pytest.fixture
def root(tmp_path):
    """Where version ``rows`` is live when the server starts."""
    (tmp_path / "root" / "m").mkdir(parents=True)
    write_active(tmp_path / "root" / "m", "rows")
    return tmp_path / "root"


def switch(server, root, version):
    write_active(root / "m", version)
    poll(lambda: server.client.get("/v2/models/m").json()["versions"], lambda v: v == [version])


def predict(server, x, prefix):
    answer = server.client.post("/v1/predict", json={"inputs": {"x": x.tolist()}, "id": prefix})
    assert answer.status_code == 200
    return answer.json()["predictions"]


def send(server, items):
    return server.client.post("/v1/labels", json=items)


def known(server):
    models = server.client.get("/v1/calibration").json()["models"]
    return {m["version"]: (m["served"], m["labelled"]) for m in models}


def parquet(items):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), sink)
    return sink.getvalue()


def test_labels_of_rows_count_while_maps_are_served_and_after(root, server):
    got = predict(server, X, "old")
    switch(server, root, "maps")
    predict(server, images(2, 1), "map")
    poll(lambda: known(server), lambda k: k == {"rows": (N, 0), "maps": (2, 0)})
    labels = [{"id": f"old:{i}", "label": CLASSES[y], "model": "m"} for i, y in enumerate(Y)]
    # One, several with some of maps, a table.
    assert send(server, labels[0]).json()["counts"] == {"accepted": 1}
    of_maps = {"id": "map:0", "label": CLASSES[0]}
    answer = send(server, [*labels[1:5], of_maps])
    assert answer.status_code == 200
    assert answer.json()["counts"] == {"accepted": 4, "invalid": 1}
    refused = send(server, of_maps)
    assert refused.status_code == 400
    assert "of maps there are no labels" in refused.json()["error"]["message"]
    assert send(server, {**labels[0], "label": "no class"}).status_code == 400
    table = server.client.post(
        "/v1/labels", content=parquet(labels[5:]), headers={"content-type": PARQUET}
    )
    assert table.json()["counts"] == {"accepted": N - 5}
    map_of_labels = send(server, {"id": "map:1", "label": [[0] * 8] * 8})
    assert map_of_labels.json()["error"]["code"] == "labels_of_maps"

    poll(lambda: known(server), lambda k: k == {"rows": (N, N), "maps": (2, 0)})
    right = sum(p["label"] == CLASSES[y] for p, y in zip(got, Y, strict=True))
    x = Exposition(server.client.get("/metrics").text)
    assert x.total("uq_labeled_predictions_total", model="m", version="rows") == N
    assert x.total("uq_labeled_correct_total", model="m", version="rows") == right
    assert not x.values("uq_labeled_predictions_total", model="m", version="maps")

    # And back again: labels of new rows count, one of a map does not.
    switch(server, root, "rows")
    predict(server, X[:3], "new")
    poll(lambda: known(server), lambda k: k["rows"] == (N + 3, N))
    more = [{"id": f"new:{i}", "label": int(Y[i])} for i in range(3)]
    counts = send(server, [*more, of_maps]).json()["counts"]
    assert counts == {"accepted": 3, "invalid": 1}
    poll(lambda: known(server), lambda k: k["rows"] == (N + 3, N + 3))
