"""Keys by role, in front of everything; and nobody from elsewhere while there are none."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from itertools import product

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.routing import Route

from service.access import OPEN, ROUTE_ROLES
from service.addresses import is_local, is_loopback
from service.app import create_app
from service.keys import ROLES, Keys, KeysError, add_key, read_keys, revoke_key
from service.later import Later
from service.routes import service_routes
from service.settings import Settings
from tests.service.conftest import BentoServer
from tests.service.helpers import as_rows

TYPE = {"content-type": "application/json"}
ROW = {"rows": as_rows(np.zeros((1, 4)))}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A file of one key for each role, and the keys by role."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, {role: add_key(file, f"the-{role}", [role])[1] for role in ROLES}


@pytest.fixture(scope="module")
def server(served, keys):
    return served(keys=keys[0])


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


REQUESTS = [
    ("predict", "POST", "/v1/predict", ROW, 200),
    ("predict", "POST", "/v2/models/tiny/infer", {"inputs": []}, 400),
    ("predict", "GET", "/v2/models/tiny", None, 200),
    ("predict", "GET", "/v2", None, 200),
    ("predict", "GET", "/", None, 200),
    ("predict", "GET", "/page.js", None, 200),
    ("labels", "POST", "/v1/labels", [], 400),
    ("labels", "GET", "/v1/calibration", None, 200),
    ("metrics", "GET", "/metrics", None, 200),
    ("admin", "DELETE", "/v1/predictions/nobody", None, 404),
]


@pytest.mark.parametrize(("needed", "method", "path", "body", "status"), REQUESTS)
def test_each_route_wants_its_role(server, keys, needed, method, path, body, status):
    for role in ROLES:
        answer = server.client.request(method, path, json=body, headers=bearer(keys[1][role]))
        if role in (needed, "admin"):
            assert answer.status_code == status, answer.text
        else:
            assert answer.status_code == 403
            assert f"this needs {needed}" in answer.text
            assert keys[1][role] not in answer.text
    answer = server.client.request(method, path, json=body)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.headers["x-request-id"]


def test_ways_to_send_a_key(server, keys):
    token = keys[1]["predict"]
    basic = base64.b64encode(f"anybody:{token}".encode()).decode()

    def get(**headers):
        return server.client.get("/v2", headers=headers).status_code

    assert get(**{"X-API-Key": token}) == 200
    assert get(Authorization=f"bearer  {token}") == 200
    assert get(Authorization=f"Basic {basic}") == 200
    swapped = base64.b64encode(token.encode()).decode()
    wrongs = ["", "Bearer", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Digest {token}"]
    for wrong in [*wrongs, "Basic %%", "Basic", f"Basic {swapped}"]:
        assert get(Authorization=wrong) == 401, wrong
    assert get(**{"X-API-Key": keys[0].read_text()[:200].strip().replace("\n", "")}) == 401
    (kept, *_) = read_keys(keys[0])
    assert get(**{"X-API-Key": kept.sha256}) == 401  # the file opens nothing


def test_what_a_browser_sends_unasked_posts_nothing(server, keys):
    basic = base64.b64encode(f":{keys[1]['predict']}".encode()).decode()
    path, headers = "/v2/models/tiny/infer", {"Authorization": f"Basic {basic}"}
    assert server.client.post(path, content=b"{}", headers=headers).status_code == 415
    typed = headers | {"content-type": "application/json"}
    assert server.client.post(path, content=b"{}", headers=typed).status_code == 400
    bare = bearer(keys[1]["predict"])  # stock clients send no type, and a key by themselves
    assert server.client.post(path, content=b"{}", headers=bare).status_code == 400


def test_health_needs_no_key(server):
    for path in OPEN:
        assert server.client.get(path).status_code == 200


def test_strangers_cannot_tell_what_exists_and_make_no_series(server, keys):
    def series():
        for _ in range(2):  # the first makes the series of this request itself
            server.client.get("/metrics", headers=bearer(keys[1]["metrics"]))
        return {
            (s.name, *sorted(s.labels.items()))
            for metric in REGISTRY.collect()
            for s in metric.samples
        }

    shapes = set()
    server.client.get("/nowhere")
    before = series()
    for path in ("/metrics", "/nowhere", "/v1/predictions/x", "/livez/x", "/v1/predict/"):
        answer = server.client.get(path)
        shapes.add((answer.status_code, json.dumps({**answer.json()["error"], "request_id": 0})))
    assert len(shapes) == 1
    assert series() == before
    known = bearer(keys[1]["labels"])
    assert server.client.get("/nowhere", headers=known).status_code == 404
    assert server.client.get("/v1/labels", headers=known).status_code == 405


def test_a_body_is_not_read_for_strangers(served, keys):
    server = served(keys=keys[0])
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        head = "POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
        client.sendall(f"{head}content-type: application/json\r\n".encode())
        client.sendall(b"expect: 100-continue\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_every_route_has_a_role():
    """A new route is the admin's until somebody decides."""

    def nobody():
        raise AssertionError

    ours = {route.path for route in service_routes(nobody, Later()) if isinstance(route, Route)}
    assert ours - OPEN <= ROUTE_ROLES.keys()
    assert ROUTE_ROLES.keys() - ours == {"/predict", "/schema.json", "/docs.json"}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(tmp_path, caplog):
    file, failures, clock = tmp_path / "keys.json", [], Clock()
    with pytest.raises(KeysError, match="keys add"):
        Keys(file)
    first = add_key(file, "first", ["predict"])[1].encode()
    keys = Keys(file, failed=lambda: failures.append(1), clock=clock)
    assert keys.find(first).name == "first"
    second = add_key(file, "second", ["labels"])[1].encode()
    assert keys.find(second) is None  # the file was looked at just now
    clock.now = 1.0
    assert keys.find(second).roles == ("labels",)
    revoke_key(file, "first")
    clock.now = 2.0
    assert keys.find(first) is None
    good = file.read_bytes()
    for at, broken in enumerate((b"{", b'{"keys": [{}]}', b"x" * (2 << 20), None)):
        file.unlink() if broken is None else file.write_bytes(broken)
        for step in (0.1, 1.2, 2.4):
            clock.now = 10.0 * (at + 1) + step
            assert keys.find(second).name == "second"
        assert len(failures) == at + 1  # once for each state of the file
    assert "kept" in caplog.text
    assert second.decode() not in caplog.text
    file.write_bytes(good)
    clock.now = 100.0
    assert keys.find(second).name == "second"
    assert len(failures) == 4


@pytest.mark.parametrize(
    "key",
    [
        {"name": "a", "roles": ["root"]},
        {"name": "a", "roles": []},
        {"name": "a b"},
        {"name": ""},
        {"sha256": "A" * 64},
        {"sha256": "0" * 63},
        {"created": "yesterday"},
        {"token": "t"},
    ],
)
def test_a_file_must_be_as_described(tmp_path, key):
    file = tmp_path / "keys.json"
    good = {"name": "a", "roles": ["predict"], "sha256": "0" * 64, "created": "2025-01-01T00:00Z"}
    file.write_text(json.dumps({"keys": [good]}))
    assert read_keys(file)[0].name == "a"
    file.write_text(json.dumps({"keys": [good | key]}))
    with pytest.raises(KeysError, match=str(file)):
        read_keys(file)
    file.write_text(json.dumps({"keys": [good, good]}))
    with pytest.raises(KeysError, match="called a"):
        read_keys(file)


LOCAL = ("127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1", "localhost")
ELSEWHERE = ("10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "192.168.1.2", "fe80::1%eth0",
             "127.0.0.1.evil.example", "127.1", "", "::ffff:0:127.0.0.1")  # fmt: skip


def test_which_addresses_are_this_machine():
    assert all(map(is_loopback, LOCAL))
    assert not any(map(is_loopback, ELSEWHERE))
    for server, client in product(LOCAL + ELSEWHERE, repeat=2):
        scope = {"server": (server, 3000), "client": (client, 5)}
        assert is_local(scope) is (server in LOCAL and client in LOCAL)
    assert is_local({"server": ("/run/hedged.sock", None), "client": None})
    assert not is_local({"server": ("/run/hedged.sock", None), "client": ("10.0.0.1", 0)})
    assert is_local({})


@given(st.text(max_size=20))
def test_no_text_is_loopback_by_accident(text):
    assert is_loopback(text) is (text == "localhost" or text in LOCAL)


def ask(app, server, client, path="/v1/predict"):
    transport = httpx.ASGITransport(app=app, client=(client, 5))

    async def main():
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{server}:3000") as c:
            return await c.post(path, json={}) if path == "/v1/predict" else await c.get(path)

    return asyncio.run(main())


def test_without_keys_only_this_machine_is_answered(classifier, keys):
    guarded = create_app(Settings(bundles=classifier))
    told = create_app(Settings(bundles=classifier, open=True))
    keyed = create_app(Settings(bundles=classifier, keys=keys[0]))
    for server, client in (("10.0.0.1", "127.0.0.1"), ("127.0.0.1", "10.0.0.1")):
        refused = ask(guarded, server, client)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "keys_needed"
        assert "HEDGED_KEYS" in refused.text
        assert "HEDGED_OPEN" in refused.text
        assert ask(guarded, server, client, "/livez").status_code == 200
        assert ask(told, server, client).status_code == 503  # it is not started
        assert ask(keyed, server, client).status_code == 401
    assert ask(guarded, "127.0.0.1", "127.0.0.1").status_code == 503
    assert ask(keyed, "127.0.0.1", "127.0.0.1").status_code == 401


def outer_address():
    """An address of this machine that others could reach."""
    for addresses in psutil.net_if_addrs().values():
        for a in addresses:
            if a.family == socket.AF_INET and not is_loopback(a.address):
                return a.address
    pytest.skip("this machine has no address but its own")


def test_bentoml_alone_listens_everywhere_and_answers_only_here(classifier, keys, tmp_path):
    outer = outer_address()
    bento = BentoServer(
        tmp_path,
        HEDGED_BUNDLES=str(classifier),
        HEDGED_REQUEST_TIMEOUT_S="5",
        HEDGED_SEND_TIMEOUT_S="5",
    )
    bento.command[bento.command.index("127.0.0.1")] = "0.0.0.0"
    with bento as server:
        here = server.client.post("/v1/predict", json=ROW)
        assert here.status_code == 200
        # A proxy on this machine speaks for somebody else, and nobody gets in by saying a name.
        proxied = server.client.post("/v1/predict", json=ROW, headers={"X-Forwarded-For": outer})
        assert proxied.status_code == 403
        with httpx.Client(base_url=f"http://{outer}:{server.port}", timeout=60) as client:
            assert client.get("/readyz").status_code == 200
            for lie in ({}, {"X-Forwarded-For": "127.0.0.1"}, {"Host": "127.0.0.1"}):
                refused = client.post("/v1/predict", json=ROW, headers=lie)
                assert refused.json()["error"]["code"] == "keys_needed"
        deep = server.client.post("/predict", content=b'{"rows":' + b"[" * 100_000, headers=TYPE)
        assert deep.status_code == 400
        # Connections are reached through uvicorn's own objects: here, in BentoML's worker, too.
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:
            silent.sendall(b"GET /livez HTT")
            assert silent.recv(100) == b""
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line[:1] == "{"]
    assert {line.get("code") for line in lines} >= {"keys_needed"}
