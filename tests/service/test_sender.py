"""Clients that do not take their answers, on real sockets: they are cut off, the others are not."""

from __future__ import annotations

import asyncio
import socket
import time

import numpy as np
import pytest

from service.errors import ServiceError
from service.sender import PIECE, Sender
from tests.factory import rows
from tests.service.helpers import healthy, poll

ROWS = 100_000
PATH = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def server(served):
    return served(send_timeout_s=2.0, max_rows=ROWS, max_queue_rows=4 * ROWS)


@pytest.fixture(scope="module")
def body():
    """A request whose answer is many megabytes: all outputs of many rows, binary."""
    x = rows("classification", ROWS, 0)[0]
    head = (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d,4],"parameters":'
        b'{"binary_data_size":%d}}],"parameters":{"binary_data_output":true}}'
    ) % (ROWS, x.nbytes)
    return head + x.tobytes(), len(head)


def ask(port, body, head, window=None):
    """A connection that has asked and not read."""
    client = socket.socket()
    if window is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    client.settimeout(60)
    client.connect(("127.0.0.1", port))
    client.sendall(
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"inference-header-content-length: {head}\r\n"
        "content-type: application/octet-stream\r\n\r\n".encode()
    )
    client.sendall(body)
    return client


def read(client):
    """What still arrives."""
    got = bytearray()
    try:
        while part := client.recv(1 << 16):
            got += part
    except ConnectionResetError:
        pass
    return bytes(got)


def cut_off(server):
    text = server.client.get("/metrics").text
    lines = [n for n in text.splitlines() if n.startswith('uq_rejected_total{reason="client_slow"')]
    return sum(float(line.split()[-1]) for line in lines)


def test_who_never_reads_is_cut_off_and_holds_nothing(server, body):
    guard, before = server.app.guarded, cut_off(server)
    clients = [ask(server.port, *body, window=4096) for _ in range(2)]
    poll(lambda: guard.reserved, lambda held: held > 10_000_000)
    assert healthy(server)  # meanwhile
    poll(lambda: cut_off(server), lambda n: n == before + len(clients))
    assert (guard.reserved, guard.held) == (0, 0)
    for client in clients:
        got = read(client)
        assert got.startswith(b"HTTP/1.1 200")
        assert len(got) < ROWS * 50  # not the whole answer: the connection is gone
        client.close()
    assert healthy(server)


def test_who_reads_gets_everything(served, body):
    server = served(max_rows=ROWS)
    with ask(server.port, *body) as client:
        head, _, got = b"", b"", b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        head, _, got = head.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), got
        length = int(head.lower().partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0])
        assert length > 20 * PIECE
        taken = len(got)
        while taken < length:
            taken += len(client.recv(1 << 20))
        assert taken == length


def send_all(send, messages, timeout=60.0):
    async def main():
        sender = Sender(send, timeout)
        try:
            for message in messages:
                await sender(message)
        finally:
            sent.append(sender.sent)

    sent = []
    try:
        asyncio.run(main())
    except ServiceError as e:
        return sent[0], e.code
    return sent[0], None


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
@pytest.mark.parametrize("more", [False, True])
def test_pieces_make_the_whole(size, more):
    body = np.random.default_rng(0).bytes(size)
    passed = []

    async def send(message):
        passed.append(message)

    start = {"type": "http.response.start", "status": 200, "headers": []}
    last = {"type": "http.response.body", "body": body, "more_body": more}
    assert send_all(send, [start, last]) == (size, None)
    assert passed[0] == start
    assert b"".join(m["body"] for m in passed[1:]) == body
    assert [m["more_body"] for m in passed[1:]] == [True] * (len(passed) - 2) + [more]
    assert max(len(m["body"]) for m in passed[1:]) <= PIECE


def test_all_pieces_share_one_time_and_other_servers_need_no_connection():
    taken = []

    async def send(message):
        taken.append(message)
        await asyncio.sleep(0.04 if len(taken) < 4 else 3600)

    whole = {"type": "http.response.body", "body": bytes(9 * PIECE)}
    assert send_all(send, [whole], timeout=1.0) == (3 * PIECE, "client_slow")


SILENT = {
    "says nothing": b"",
    "stops in its first line": b"POST /v1/pre",
    "stops in its headers": b"GET /livez HTTP/1.1\r\nhost: x\r\nx-a: ",
    "stops in its second request": b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET /livez HT",
}


def test_who_does_not_finish_a_request_is_cut_off(served):
    server = served(request_timeout_s=1.0, send_timeout_s=1.0)
    assert healthy(server)
    started = {}
    for name, sent in SILENT.items():
        started[name] = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        started[name].sendall(sent)
    for name, client in started.items():
        answered = read(client)  # ends when the server has closed
        assert answered.count(b"HTTP/1.1 200") == (name == "stops in its second request"), answered
        client.close()
    assert healthy(server)


def test_who_comes_back_is_not(served):
    server = served(request_timeout_s=1.0, send_timeout_s=1.0)
    request = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        deadline = time.monotonic() + 1.6
        while time.monotonic() < deadline:
            client.sendall(request[:20])
            client.sendall(request[20:])
            answer = b""
            while not answer.endswith(b'{"live":true}'):
                part = client.recv(1 << 16)
                assert part, answer
                answer += part
