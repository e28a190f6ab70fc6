"""The guard around small ASGI applications, message by message and behind a real server."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router

from service.errors import ServiceError
from service.guard import Guard

JSON = (b"content-type", b"application/json")


async def echo(request):
    return PlainTextResponse(await request.body())


async def page(_request):
    return PlainTextResponse("<p>", media_type="text/html")


async def broken(_request):
    raise RuntimeError("a secret of the inside")


async def refusing(_request):
    raise ServiceError(409, "conflict", "no", headers={"Retry-After": "7"})


def make(**options):
    router = Router(
        [
            Route("/echo/{name}", echo, methods=["POST"]),
            Route("/v2/echo", echo, methods=["POST"]),
            Route("/page", page),
            Route("/broken", broken),
            Route("/refusing", refusing),
        ],
        redirect_slashes=False,
    )
    return Guard(router, **{"max_body_bytes": 10, "body_timeout": 30.0, **options})


class Exchange:
    """One request fed by hand: the parts of its body, then silence."""

    def __init__(self, method, path, parts=(b"",), headers=(), app=None, ended=True):
        self.parts = list(parts)
        self.ended = ended
        self.received = 0
        self.sent = []
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": list(headers),
            "query_string": b"",
            "app": None,
        }
        app = app or make()
        asyncio.run(app(scope, self.receive, self.send))
        app.later.flush()

    async def receive(self):
        if not self.parts:
            if self.ended:
                return {"type": "http.disconnect"}
            await asyncio.sleep(3600)
        self.received += 1
        part = self.parts.pop(0)
        more = bool(self.parts) or not self.ended
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def headers(self):
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def body(self):
        return b"".join(m.get("body", b"") for m in self.sent[1:])


def test_a_body_arrives_whole():
    got = Exchange("POST", "/echo/a", [b"ab", b"", b"cd"], [JSON])
    assert (got.status, got.body) == (200, b"abcd")


def test_bytes_are_counted_as_they_come():
    got = Exchange("POST", "/echo/a", [b"123456", b"78901"], [JSON, (b"content-length", b"3")])
    assert got.status == 413
    error = json.loads(got.body)["error"]
    assert error["code"] == "body_too_large"
    assert error["request_id"] == got.headers["x-request-id"]
    assert "10 bytes" in error["message"]


def test_a_refused_body_is_read_to_a_bound_and_then_cut_off():
    bounded = Exchange("POST", "/echo/a", [b"x" * 10] * 4, [JSON])
    assert bounded.status == 413
    assert "connection" not in bounded.headers  # its end was seen, the connection is clean
    endless = Exchange("POST", "/echo/a", [b"x" * 10] * 1000, [JSON])
    assert endless.status == 413
    assert endless.headers["connection"] == "close"
    assert endless.received < 10


def test_a_declared_length_is_refused_before_anything_is_read():
    headers = [JSON, (b"content-length", b"11"), (b"expect", b"100-continue")]
    got = Exchange("POST", "/echo/a", [b"x"], headers)
    assert (got.status, got.received) == (413, 0)
    huge = Exchange("POST", "/echo/a", [b"x"], [JSON, (b"content-length", b"9" * 5000)])
    assert huge.status == 413


def test_a_body_that_does_not_come_is_given_up():
    app = make(body_timeout=0.01)
    got = Exchange("POST", "/echo/a", [b"x"], [JSON], app, ended=False)
    assert got.status == 408
    assert got.headers["connection"] == "close"


def test_a_body_that_stops_midway_is_given_up():
    got = Exchange("POST", "/echo/a", [b"ab"], [JSON], app=make(body_timeout=0.02), ended=False)
    assert (got.status, json.loads(got.body)["error"]["code"]) == (408, "body_timeout")
    assert got.headers["connection"] == "close"


def test_of_a_header_sent_twice_the_first_counts():
    ids = [(b"x-request-id", b"a"), (b"x-request-id", b"b")]
    twice = [(b"content-type", b"text/html"), JSON, *ids]
    got = Exchange("POST", "/echo/a", [b"ab"], twice)
    assert (got.status, got.headers["x-request-id"]) == (415, "a")
    assert Exchange("POST", "/echo/a", [b"ab"], [JSON, *twice]).status == 200


def test_a_client_that_leaves_gets_nothing():
    got = Exchange("POST", "/echo/a", [], [JSON])
    assert got.sent == []


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/echo/a", [(b"content-type", b"application/json; charset=utf-8")], 200),
        ("/echo/a", [(b"content-type", b"Application/JSON")], 200),
        ("/echo/a", [(b"content-type", b"application/x-ndjson")], 200),
        ("/echo/a", [(b"content-type", b"application/octet-stream")], 200),
        ("/echo/a", [(b"content-type", b"application/vnd.bentoml+pickle")], 415),
        ("/echo/a", [(b"content-type", b"multipart/form-data; boundary=x")], 415),
        ("/echo/a", [(b"content-type", b"text/plain")], 415),
        ("/echo/a", [(b"content-type", b"\xff" * 500)], 415),
        ("/echo/a", [], 415),
        ("/v2/echo", [], 200),  # stock OIP clients send none
        ("/v2/echo", [(b"content-type", b"text/plain")], 415),
        ("/echo/a", [JSON, (b"content-encoding", b"gzip")], 415),
        ("/echo/a", [JSON, (b"content-encoding", b"identity")], 415),
    ],
)
def test_media_types(path, headers, status):
    got = Exchange("POST", path, [b"x"], headers)
    assert got.status == status


def test_a_get_needs_no_media_type_and_pages_are_locked_down():
    got = Exchange("GET", "/page")
    assert got.status == 200
    assert "default-src 'none'" in got.headers["content-security-policy"]
    assert got.headers["x-frame-options"] == "DENY"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" not in Exchange("POST", "/echo/a", [b""], [JSON]).headers


def test_request_ids():
    given_id = Exchange("GET", "/page", headers=[(b"x-request-id", b"my.id-1")])
    assert given_id.headers["x-request-id"] == "my.id-1"
    for bad in (b"", b"a b", b"\xe9", b"x" * 129, b"a\x00"):
        made = Exchange("GET", "/page", headers=[(b"x-request-id", bad)]).headers["x-request-id"]
        assert made.isalnum()
        assert len(made) == 32


def test_one_error_shape():
    missing = Exchange("GET", "/nowhere")
    assert missing.status == 404
    assert set(json.loads(missing.body)["error"]) == {"code", "message", "request_id"}
    oip = Exchange("GET", "/v2/nowhere")
    assert (oip.status, json.loads(oip.body)) == (404, {"error": "Not Found"})
    wrong = Exchange("GET", "/echo/a")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert json.loads(wrong.body)["error"]["code"] == "method_not_allowed"
    refused = Exchange("GET", "/refusing")
    assert (refused.status, refused.headers["retry-after"]) == (409, "7")


def test_the_inside_does_not_show(caplog):
    got = Exchange("GET", "/broken")
    assert got.status == 500
    assert b"secret" not in got.body
    assert "secret" in caplog.text  # the operator sees it
    assert json.loads(got.body)["error"]["request_id"] in caplog.text


def series():
    return {
        (s.labels["route"], s.labels["code"])
        for metric in REGISTRY.collect()
        if metric.name == "uq_request_duration_seconds"
        for s in metric.samples
    }


def test_addresses_make_no_series():
    Exchange("GET", "/nowhere")
    Exchange("POST", "/echo/a", [b""], [JSON])
    before = series()
    for k in range(50):
        Exchange("GET", f"/nowhere/{k}")
        Exchange("POST", f"/echo/{k}", [b""], [JSON])
    assert series() == before
    assert ("other", "404") in before
    assert ("/echo/{name}", "200") in before


def test_websockets_are_closed():
    sent = []

    async def main():
        async def send(message):
            sent.append(message)

        await make()({"type": "websocket", "path": "/page"}, None, send)

    asyncio.run(main())
    assert sent == [{"type": "websocket.close", "code": 1008}]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "BREW"]),
    st.text(max_size=20).map(lambda t: "/" + t),
    st.lists(st.binary(max_size=8), max_size=4),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"content-type",
                    b"content-length",
                    b"x-request-id",
                    b"content-encoding",
                    b"expect",
                ]
            ),
            st.binary(max_size=30) | st.just(b"application/json"),
        ),
        max_size=4,
    ),
)
def test_nothing_a_client_sends_is_the_servers_fault(method, path, parts, headers):
    got = Exchange(method, path, parts, headers)
    assert not got.sent or got.status < 500


def test_bodies_of_all_requests_together_are_bounded():
    async def main():
        app = make(max_body_bytes=10, max_body_bytes_total=25)
        waiting, done = asyncio.Semaphore(0), asyncio.Event()

        async def post(body, declared=None):
            parts, sent = [body], []

            async def receive():
                if parts:
                    return {"type": "http.request", "body": parts.pop(), "more_body": True}
                waiting.release()
                await done.wait()
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message):
                sent.append(message)

            headers = [JSON, *([(b"content-length", declared)] if declared else [])]
            headers.append((b"expect", b"100-continue"))
            scope = {"type": "http", "method": "POST", "path": "/echo/a", "headers": headers}
            await app({**scope, "query_string": b"", "app": None}, receive, send)
            return sent[0]["status"], dict(sent[0]["headers"])

        held = [asyncio.ensure_future(post(b"x" * 10)) for _ in range(2)]
        for _ in held:
            await waiting.acquire()
        for refused in (post(b"x" * 6), post(b"", b"6")):
            status, headers = await refused
            assert (status, headers[b"retry-after"]) == (503, b"1")
        fits = asyncio.ensure_future(post(b"x" * 5, b"5"))
        await waiting.acquire()
        done.set()
        assert [(await one)[0] for one in (*held, fits)] == [200] * 3
        # What was answered holds nothing.
        assert (await post(b"x" * 10))[0] == 200
        assert app.held == 0

    asyncio.run(main())


def test_answers_are_bounded_together_until_they_are_sent():
    guards, told = [], []

    async def large(scope, receive, send):
        scope["hedged.reserve"](8)
        told.append(guards[0].reserved)
        if len(told) == 1:
            # Another request meanwhile: there is room for 2 of its 8 bytes.
            refused = await asyncio.to_thread(Exchange, "GET", "/page", app=guards[0])
            assert refused.status == 503
            assert json.loads(refused.body)["error"]["code"] == "answers_full"
        await PlainTextResponse("x")(scope, receive, send)

    guards.append(Guard(large, max_body_bytes=10, max_answer_bytes_total=10))
    assert Exchange("GET", "/page", app=guards[0]).status == 200
    assert told == [8]
    assert guards[0].reserved == 0
    guards[0].max_answer_bytes_total = 1  # an idle server makes any
    assert Exchange("GET", "/page", app=guards[0]).status == 200
