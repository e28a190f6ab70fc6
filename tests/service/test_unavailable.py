"""A root of which one model is broken: the others are served, and of the broken one all is said."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tritonclient.http as triton

from posthoc.contract import BundleError
from service.bundles import write_active
from service.live import open_models
from service.settings import Settings
from tests.factory import rows, version_of
from tests.service.conftest import Server
from tests.service.helpers import poll
from tests.service.pages import browser, tab, visit
from tests.service.streams import Exposition
from tests.service.test_drain import HedgedServer

__all__ = ["browser", "tab", "visit"]

X = rows("classification", 5, 3)[0]


def damaged(root, name, bundle):
    folder = version_of(bundle, root, name, "1")
    (folder / "head.onnx").write_bytes(b"changed")


def lying(root, name, bundle):
    version_of(bundle, root, name, "1", golden=False)


def pointing(root, name, bundle):
    version_of(bundle, root, name, "1")
    write_active(root / name, "9")


def half(root, name, bundle):
    version_of(bundle, root, name, "1")
    (root / name / "active.json").write_text('{"version"')


def undecided(root, name, bundle):
    version_of(bundle, root, name, "1")
    version_of(bundle, root, name, "2")


def empty(root, name, bundle):
    (root / name / "1").mkdir(parents=True)


BROKEN = {
    damaged: "head.onnx was changed",
    lying: "golden rows do not reproduce",
    pointing: "names version '9'; there are 1",
    half: 'active.json must be {"version": "…"}',
    undecided: "holds 2 versions and no active.json",
    empty: "holds 0 versions and no active.json",
}


def mend(root, name, bundle):
    """As a deploy would: a good version, and its name in active.json."""
    version_of(bundle, root, name, "3")
    write_active(root / name, "3")


def gauge(server, name):
    x = Exposition(server.client.get("/metrics").text)
    return x.total("uq_model_unavailable", model=name)


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_model_is_named_and_served_once_it_is_mended(breaks, classifier, tmp_path):
    root, bad, good = tmp_path / "root", f"bad-{breaks.__name__}", f"good-{breaks.__name__}"
    version_of(classifier, root, good, "1")
    breaks(root, bad, classifier)
    (root / "lost+found").mkdir()  # nobody's model
    body = {"inputs": {"x": X.tolist()}}
    settings = Settings(bundles=root, data_dir=tmp_path / "data", poll_s=0.05)
    with (
        Server(settings) as server,
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        get, post = server.client.get, server.client.post
        for path in ("/readyz", "/v2/health/ready"):
            answer = get(path)
            assert (answer.status_code, answer.json()) == (
                200,
                {"ready": True, "unavailable": [bad]},
            )
        told = get("/v2").json()
        assert told["models"] == [good]
        assert list(told["unavailable"]) == [bad]
        assert BROKEN[breaks] in told["unavailable"][bad]
        assert str(root) not in told["unavailable"][bad]
        assert client.is_server_ready() and client.is_model_ready(good)
        assert not client.is_model_ready(bad)
        assert (gauge(server, bad), gauge(server, good)) == (1, 0)
        for method, path in (
            ("POST", f"/v1/models/{bad}/predict"),
            ("POST", f"/v2/models/{bad}/infer"),
            ("POST", f"/v2/models/{bad}/versions/1/infer"),
            ("GET", f"/v1/models/{bad}/example"),
            ("GET", f"/v2/models/{bad}"),
            ("GET", f"/v2/models/{bad}/ready"),
        ):
            answer = server.client.request(method, path, json=body if method == "POST" else None)
            assert answer.status_code == 503, path
            assert answer.headers["retry-after"] == "1"
            error = answer.json()["error"]
            if path.startswith("/v1"):
                assert error["code"] == "model_unavailable"
                error = error["message"]
            assert f"model {bad!r} cannot be served: " in error
            assert BROKEN[breaks] in error and str(tmp_path) not in error
        assert post(f"/v1/models/{good}/predict", json=body).status_code == 200
        # Who names no model must not get the other one.
        answer = post("/v1/predict", json=body)
        assert answer.status_code == 400
        assert bad in answer.json()["error"]["message"]
        # Its predictions of before the restart may still get labels, and be forgotten.
        label = {"id": "earlier:0", "label": "a", "model": bad}
        assert post("/v1/labels", json=label).json()["counts"] == {"pending": 1}
        assert get("/v1/calibration", params={"model": bad}).status_code == 200
        gone = server.client.delete("/v1/predictions/earlier:0", params={"model": bad})
        assert gone.status_code == 404
        assert get("/v2/models/lost+found").status_code == 404

        mend(root, bad, classifier)
        poll(lambda: get("/readyz").json()["unavailable"], lambda names: names == [])
        assert post(f"/v1/models/{bad}/predict", json=body).json()["version"] == "3"
        assert client.is_model_ready(bad)
        assert get("/v2").json()["unavailable"] == {}
        assert gauge(server, bad) == 0
        assert Exposition(get("/metrics").text).total("uq_swaps_total", model=bad, result="ok") == 1


def test_a_broken_model_that_is_taken_away_is_missed_no_more(classifier, tmp_path):
    root = tmp_path / "root"
    version_of(classifier, root, "left", "1")
    half(root, "taken", classifier)
    with Server(Settings(bundles=root, data_dir=tmp_path / "data", poll_s=0.05)) as server:
        assert server.client.get("/readyz").json()["unavailable"] == ["taken"]
        shutil.rmtree(root / "taken")
        poll(lambda: server.client.get("/readyz").json()["unavailable"], lambda names: names == [])
        assert server.client.get("/v2/models/taken").status_code == 404
        assert gauge(server, "taken") == 0
        # One that comes broken, while the server runs, is no other. It comes in one step: what is
        # whole for a moment may be served from that moment on.
        damaged(tmp_path / "beside", "new", classifier)
        (tmp_path / "beside" / "new").rename(root / "new")
        poll(lambda: server.client.get("/readyz").json()["unavailable"], lambda n: n == ["new"])
        assert "head.onnx was changed" in server.client.get("/v2/models/new").json()["error"]
        assert gauge(server, "new") == 1
        answer = server.client.post(
            "/v1/models/left/predict", json={"inputs": {"x": np.zeros((1, 4)).tolist()}}
        )
        assert answer.status_code == 200


def test_where_no_model_can_be_served_every_reason_is_given(classifier, tmp_path):
    for n, breaks in enumerate(BROKEN):
        breaks(tmp_path, f"m{n}", classifier)
    with pytest.raises(BundleError) as refused:
        open_models(tmp_path, device="cpu", threads=1)
    said = str(refused.value)
    assert said.startswith(f"no model of {tmp_path} can be served: ")
    for n, says in enumerate(BROKEN.values()):
        assert f"m{n}: " in said and says in said


def test_hedged_serve_prints_what_it_starts_without(classifier, tmp_path):
    root = tmp_path / "root"
    version_of(classifier, root, "a", "1")
    lying(root, "b", classifier)
    damaged(root, "c", classifier)
    half(root, "d", classifier)
    with HedgedServer(tmp_path, root, workers=2) as server:
        poll(lambda: server.log.read_text(), lambda text: "hedged: ready" in text)
        status, answer, _ = server.ask("/readyz")
        assert (status, answer) == (200, {"ready": True, "unavailable": ["b", "c", "d"]})
        poll(lambda: server.log.read_text().count("d is not served"), lambda n: n == 2)
    lines = [x for x in server.log.read_text().splitlines() if x.startswith("hedged: ")]
    said = [x.removeprefix("hedged: not served: ") for x in lines if "not served" in x]
    assert [x[:3] for x in said] == ["b: ", "c: ", "d: "]  # once, though two workers say it
    assert "golden rows do not reproduce" in said[0]
    assert "head.onnx was changed" in said[1]
    assert "active.json must be" in said[2]


def test_the_page_names_it(classifier, tmp_path, visit):
    root = tmp_path / "root"
    version_of(classifier, root, "a", "1")
    half(root, "b", classifier)
    with Server(Settings(bundles=root, data_dir=tmp_path / "data", poll_s=0.05)) as server:
        page = visit(server)
        page.shows("not served: b")
        page.shows("Predictions 0")  # of the other
        mend(root, "b", classifier)
        poll(lambda: "not served" in page.text(), lambda there: not there)
        assert page.console == []
