"""Headers without end: refused after so many bytes, whoever sends them and however they are cut."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket

import numpy as np
import psutil
import pytest
import uvicorn
from uvicorn.server import ServerState

from service.headers import bound_headers
from tests.service.conftest import BentoServer
from tests.service.helpers import as_rows, healthy
from tests.service.streams import Exposition

LIMIT = 2048
FOREVER = 64 << 20  # bytes, which nobody reads to the end
BODY = json.dumps({"rows": as_rows(np.zeros((2, 4)))}).encode()


@pytest.fixture(scope="module")
def server(served):
    return served(max_header_bytes=LIMIT)


def connect(server):
    found = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def pour(connection, part, most=FOREVER):
    """Send ``part`` over and over until the server does not take it; how many bytes it took."""
    taken = 0
    with contextlib.suppress(ConnectionError):
        while taken < most:
            taken += connection.send(part)
    return taken


def answers(connection):
    """Status, headers and body of one answer after the other, until the server closes."""
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            headers = http.client.parse_headers(stream)
            body = stream.read(int(headers["content-length"]))
            yield int(line.split()[1]), headers, body


ENDLESS = {
    "one value": (b"GET /livez HTTP/1.1\r\nx: ", b"a"),
    "one name": (b"GET /livez HTTP/1.1\r\n", b"a"),
    "many": (b"GET /livez HTTP/1.1\r\n", b"x: y\r\n"),
    "a path": (b"GET /v2/", b"a"),
    "a query": (b"GET /v2?", b"a"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_headers_without_end_are_refused_and_the_neighbours_answered(server, what):
    begin, more = ENDLESS[what]
    with connect(server) as one:
        one.sendall(begin + more * 100)
        assert healthy(server)  # while it goes on
        one.sendall(more * (LIMIT // len(more)))
        status, headers, body = next(answers(one))
        assert (status, headers["connection"]) == (431, "close")
        said = json.loads(body)["error"]
        if begin.startswith(b"GET /v2"):
            assert f"larger than {LIMIT} bytes" in said
        else:
            assert said["code"] == "headers_too_large"
            assert said["request_id"] == headers["x-request-id"]
        assert healthy(server)
        # It may send a little more, so that it reads the reason, and then it is cut off.
        assert pour(one, more * 4096) < FOREVER
    assert healthy(server)
    x = Exposition(server.client.get("/metrics").text)
    assert x.total("uq_rejected_total", reason="headers_too_large") >= 1


def test_trailers_without_end_are_cut_off(server):
    with connect(server) as one:
        one.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
        )
        assert pour(one, b"x: y\r\n" * 100) < FOREVER
    assert healthy(server)


def request(rng):
    """A request whose headers are within the bound, and of any body."""
    pad = b"x-pad: " + b"p" * int(rng.integers(0, LIMIT - 300)) + b"\r\n"
    if rng.random() < 0.4:
        return b"GET /livez HTTP/1.1\r\nhost: x\r\n" + pad + b"\r\n"
    body = BODY + b" " * int(rng.integers(0, 4 * LIMIT))
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + pad
    if rng.random() < 0.5:
        return head + b"content-length: %d\r\n\r\n" % len(body) + body
    cut = int(rng.integers(1, len(body)))
    parts = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:cut], body[cut:]))
    trailer = b"x-trailer: " + b"t" * int(rng.integers(0, 300)) + b"\r\n"
    return head + b"transfer-encoding: chunked\r\n\r\n" + parts + b"0\r\n" + trailer + b"\r\n"


@pytest.mark.parametrize("seed", range(6))
def test_what_is_within_the_bound_is_answered_however_it_is_cut(server, seed):
    """Many requests behind one another, cut at random places."""
    rng = np.random.default_rng(seed)
    sent = [request(rng) for _ in range(20)]
    stream, at = b"".join(sent), 0
    with connect(server) as one:
        while at < len(stream):
            size = int(rng.choice([1, 50, 1000, 3 * LIMIT, 10 * LIMIT]) * rng.random()) + 1
            one.sendall(stream[at : at + size])
            at += size
        got = answers(one)
        assert [next(got)[0] for _ in sent] == [200] * len(sent)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_over_the_bound_is_not_however_it_is_cut(server, seed):
    rng = np.random.default_rng(seed)
    # What begins behind other bytes is counted from the next ones on: at most twice the bound.
    head = b"GET /livez HTTP/1.1\r\nx-pad: " + b"p" * (2 * LIMIT + int(rng.integers(1, LIMIT)))
    stream, at = request(rng) + head + b"\r\n\r\n", 0
    with connect(server) as one:
        while at < len(stream):
            size = int(rng.choice([1, 50, 1000, 3 * LIMIT]) * rng.random()) + 1
            pour(one, stream[at : at + size], 1)
            at += size
        statuses = []
        with contextlib.suppress(ConnectionError, StopIteration):
            got = answers(one)
            statuses += [next(got)[0], next(got)[0]]
        # Cut off where it was still answering the first.
        assert statuses in ([], [200], [200, 431])


def test_a_worker_of_bentoml_does_not_grow(classifier, tmp_path):
    with BentoServer(tmp_path, HEDGED_BUNDLES=str(classifier)) as server:
        assert healthy(server)
        (worker,) = server.workers()
        before = psutil.Process(worker.pid).memory_info().rss
        taken = []
        for _ in range(10):
            with connect(server) as one:
                one.sendall(b"GET /livez HTTP/1.1\r\nx: ")
                taken.append(pour(one, b"a" * (1 << 20)))
                assert healthy(server)
        # Of 64 MiB each: a bound of 64 KiB, what is thrown away, and what sockets hold.
        assert max(taken) < FOREVER
        assert psutil.Process(worker.pid).memory_info().rss - before < 32 << 20
        x = Exposition(server.client.get("/metrics").text)
        assert x.total("uq_rejected_total", reason="headers_too_large") == len(taken)


def test_with_h11_its_own_bound_is_set():
    config = uvicorn.Config(lambda: None, http="h11", lifespan="on")
    lifespan = config.load() or config.lifespan_class(config)
    bound_headers(lifespan.receive, 4096, met=lambda _: None, refused=lambda: None)
    assert config.h11_max_incomplete_event_size == 4096
    assert config.http_protocol_class.__name__ == "H11Protocol"


@pytest.mark.parametrize(("level", "read"), [(logging.INFO, True), (logging.WARNING, False)])
def test_the_line_of_an_answer_is_made_where_it_is_read(level, read, caplog):
    caplog.set_level(level, "uvicorn.access")

    async def answered(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def asked():
        config = uvicorn.Config(answered, http="httptools", lifespan="on", log_config=None)
        config.load()
        bound_headers(
            config.lifespan_class(config).receive, 4096, met=lambda _: None, refused=lambda: None
        )
        state = ServerState()
        protocol = config.http_protocol_class
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol(config, state, {}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET /there HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"204"
        (connection,) = state.connections
        writer.close()
        server.close()
        return connection.access_log

    assert asyncio.run(asked()) is read
    assert [r.getMessage().endswith('"GET /there HTTP/1.1" 204') for r in caplog.records] == (
        [True] * read
    )
