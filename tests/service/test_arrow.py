"""Arrow streams in and out against the graph run directly."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from calibration.predictor import Predictor
from service import arrow
from service.errors import ServiceError
from service.media import ARROW, JSON, preferred
from service.settings import Settings
from tests.documentation import ROOT
from tests.factory import CLASSES, rows
from tests.service.conftest import Server
from tests.service.helpers import as_rows
from tests.service.maps import images
from tests.service.tables import ROWS, TABLES, X, columns, post, read, second, stream


@pytest.fixture(scope="module")
def server(served):
    return served(max_rows=100, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def direct(classifier):
    return Predictor(classifier)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("name", TABLES)
def test_every_way_to_write_a_table_gives_the_graphs_numbers(server, direct, name, batch):
    want = direct.run({"x": X})
    got = read(post(server, stream(TABLES[name], batch)))
    assert got.schema.metadata[b"model"] == b"tiny"
    base = got.schema.metadata[b"id"].decode()
    assert got["id"].to_pylist() == [f"{base}:{row}" for row in range(ROWS)]
    assert got.column_names == ["id", *(n for n in direct.fields if n != "probs")]
    assert got["label"].to_pylist() == [CLASSES[label] for label in want["label"]]
    members = [[CLASSES[c] for c in np.flatnonzero(row)] for row in want["set"]]
    assert got["set"].to_pylist() == members
    for field in ("confidence", "entropy", "epistemic", "set_size", "ood_pvalue", "ood"):
        np.testing.assert_array_equal(got[field].to_numpy(), want[field])


def test_options_are_in_the_schemas_metadata_and_ids_in_a_column(server, direct):
    names = pa.array([f"r{k}" for k in range(ROWS)], pa.string_view())
    for ids, path in ((names, "/v1/predict"), (names.cast(pa.string()).dictionary_encode(),
                                               "/v1/models/tiny/predict")):  # fmt: skip
        table = columns(id=ids).replace_schema_metadata(
            {"alpha": "0.3", "outputs": '["set_size", "probs", "y"]', "id": "q", "pandas": "{}"}
        )
        got = read(post(server, stream(table), path))
        want = direct.run({"x": X}, outputs=["set_size", "probs", "y"], q_hat=direct.q_hat(0.3))
        assert got.column_names == ["id", "set_size", "probs", "y"]
        assert got["id"].to_pylist() == names.to_pylist()
        assert got.schema.metadata[b"id"] == b"q"
        np.testing.assert_array_equal(got["set_size"].to_numpy(), want["set_size"])
        for field in ("probs", "y"):
            np.testing.assert_array_equal(np.stack(got[field].to_numpy()), want[field])
    levels = columns(id=range(ROWS)).replace_schema_metadata({"alpha": str([0.1, 0.3] * 3 + [0.2])})
    got = read(post(server, stream(levels)))
    q = np.array([direct.q_hat(a) for a in [0.1, 0.3] * 3 + [0.2]])
    want = direct.run({"x": X}, outputs=["set_size"], q_hat=q)
    np.testing.assert_array_equal(got["set_size"].to_numpy(), want["set_size"])
    assert got["id"].to_pylist() == [str(row) for row in range(ROWS)]


def test_a_regression_has_plain_numbers(served, regressor):
    server, predictor = served("regression"), Predictor(regressor)
    x = rows("regression", 4, 3)[0]
    want = predictor.run({"x": x})
    got = read(post(server, stream(pa.table(dict(zip("pqr", x.T, strict=True))))))
    for field in ("mean", "std", "lower", "upper"):
        np.testing.assert_array_equal(got[field].to_numpy(), want[field][:, 0])
    np.testing.assert_array_equal(np.stack(got["quantiles"].to_numpy()), want["quantiles"][:, 0])


@pytest.mark.parametrize("name", ["segmenter", "restorer"])
def test_images_are_tensors_or_nested_lists(maps_root, tmp_path, name):
    predictor = Predictor(maps_root / name / "1")
    x = images(3, 5, (8, 8) if name == "segmenter" else (5, 11))
    # Channels last in memory: the tensor's permutation says so.
    turned = pa.FixedShapeTensorArray.from_numpy_ndarray(x.transpose(0, 2, 3, 1).copy())
    kind = pa.fixed_shape_tensor(pa.float32(), turned.type.shape, permutation=[2, 0, 1])
    turned = pa.ExtensionArray.from_storage(kind, turned.storage)
    nested = pa.array(x.tolist(), pa.list_(pa.list_(pa.list_(pa.float32()))))
    field = "label" if name == "segmenter" else "mean"
    want = predictor.run({"x": x}, outputs=[field, "ood_pvalue"])
    with Server(Settings(bundles=maps_root, data_dir=tmp_path)) as server:
        for column in (turned, nested):
            table = pa.table({"x": column})
            got = read(post(server, stream(table, 2), f"/v1/models/{name}/predict"))
            for key, value in want.items():
                np.testing.assert_array_equal(_dense(got[key], value.shape), value)


def _dense(column, shape):
    column = column.combine_chunks()
    while not pa.types.is_primitive(column.type):
        column = column.storage if isinstance(column, pa.ExtensionArray) else column.flatten()
    return column.to_numpy().reshape(shape)


@pytest.mark.parametrize(
    ("sent", "accept", "gives"),
    [
        (ARROW, None, ARROW),
        (ARROW, "*/*", ARROW),
        (ARROW, JSON, JSON),
        (ARROW, f"{JSON};q=0.5, {ARROW}", ARROW),
        (ARROW, f"{JSON}, {ARROW};q=0.5", JSON),
        (JSON, None, JSON),
        (JSON, "text/html, */*;q=0.8", JSON),
        (JSON, ARROW.upper(), ARROW),
        (JSON, f"{ARROW};q=0", JSON),
        (JSON, f"{ARROW};q=x", JSON),
        (JSON, f"{ARROW}, {JSON}", JSON),
    ],
)
def test_who_accepts_what(server, direct, sent, accept, gives):
    assert preferred([accept or ""], (JSON, ARROW), default=sent) == gives
    headers = {"content-type": sent, "accept": accept or "*/*"}
    body = stream(columns()) if sent == ARROW else None
    json = None if sent == ARROW else {"rows": as_rows(X)}
    answer = server.client.post("/v1/predict", content=body, json=json, headers=headers)
    want = direct.run({"x": X})["confidence"]
    if gives == ARROW:
        np.testing.assert_array_equal(read(answer)["confidence"].to_numpy(), want)
    else:
        got = [row["confidence"] for row in answer.json()["predictions"]]
        np.testing.assert_array_equal(np.array(got, np.float32), want)


def test_whole_numbers_keep_their_value():
    big = (1 << 53) + 1
    signed, unsigned = np.array([big, -1]), np.array([1, big], np.uint64)
    spec = arrow.TensorSpec(name="n", dtype="int64", shape=(-1, 2))
    made = arrow._input({"s": [signed], "u": [unsigned]}, ("s", "u"), spec)
    assert made.tolist() == [[big, 1], [-1, big]]
    with pytest.raises(ServiceError, match="row 0 of column 'u' does not fit int64"):
        arrow._input({"s": [signed], "u": [unsigned + np.uint64(1 << 63)]}, ("s", "u"), spec)


def test_what_is_not_finite_goes_in_where_it_may(served):
    """The tiny model has no answer to it, which is another refusal than that of the input."""
    body = second([1.0, np.nan, *[0.0] * 5])
    assert post(served(nonfinite="reject"), body).status_code == 400
    answer = post(served(nonfinite="allow"), body)
    assert answer.status_code == 422
    assert "row 1: the model's" in answer.json()["error"]["message"]


def test_the_few_lines_of_the_page(server, capsys):
    pattern = r"test_the_few_lines_of_the_page -->\n```python\n(.*?)```"
    page = ROOT / "docs" / "reference" / "http.md"
    (block,) = re.findall(pattern, page.read_text("utf-8"), re.S)
    exec(compile(block.replace(":3000", f":{server.port}"), str(page), "exec"), {})
    assert "label: dictionary<values=string" in capsys.readouterr().out
