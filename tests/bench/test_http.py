"""The load generator and the plain servers of the HTTP benchmark, for real."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bench.http_sides import Question, plain_sides
from bench.wrk import latencies, wrk
from calibration.predictor import Predictor
from posthoc.contract import HedgedError
from tests.factory import tiny_bundle

STALL_S = 0.1


class Echo(BaseHTTPRequestHandler):
    """200 for the expected body, else 400."""

    protocol_version = "HTTP/1.1"
    seen = 0
    stalls = 0  # every so many requests, for STALL_S
    stalled = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        Echo.seen += 1
        if Echo.stalls and Echo.seen % Echo.stalls == 0:
            Echo.stalled += 1
            threading.Event().wait(STALL_S)
        good = json.loads(body) == {"q": 'a "quoted" \\ word\n'}
        self.send_response(200 if good and self.headers["x-side"] == "1" else 400)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def echo():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_wrk_sends_the_body_as_it_is_and_counts(echo):
    Echo.seen = 0
    body = json.dumps({"q": 'a "quoted" \\ word\n'}).encode()
    found = wrk(echo, body, 2, 1, {"X-Side": "1"})
    assert 0 < found.requests <= Echo.seen
    assert 0 < found.p50 <= found.p99 < 1
    assert found.per_second == pytest.approx(found.requests, rel=0.5)


def test_latencies_are_of_real_requests_and_wrks_own_add_what_a_wait_held_back(echo, monkeypatch):
    monkeypatch.setattr(Echo, "stalls", 200)
    monkeypatch.setattr(Echo, "stalled", 0)
    body = json.dumps({"q": 'a "quoted" \\ word\n'}).encode()
    found, took = latencies(echo, body, 2, {"X-Side": "1"})
    assert 0 <= len(took) - found.requests <= 1  # the last may be answered after the end
    slow = [seconds for seconds in took if seconds >= STALL_S]
    assert Echo.stalled - 1 <= len(slow) <= Echo.stalled
    assert 0 < len(slow) < len(took) / 100  # so the real p99 is none of them
    assert float(np.quantile(took, 0.99)) < STALL_S / 2 < found.p99


def test_an_answer_that_is_no_success_is_an_error(echo):
    with pytest.raises(HedgedError, match="no success"):
        wrk(echo, b'{"q": "other"}', 1, 1, {"X-Side": "1"})


def test_every_side_of_ours_starts_and_answers_the_golden_row(tmp_path):
    bundle = tiny_bundle(tmp_path / "b")
    question = Question.of(bundle)
    row = json.loads(question.plain)["x"]
    with np.load(bundle / "golden.npz", allow_pickle=False) as data:
        assert np.array_equal(np.float32(row), data["in/x"][:1])
    assert question.path == f"/v2/models/{Predictor(bundle).manifest.name}/infer"
    for name, side in plain_sides(question, tmp_path).items():
        with side as standing:
            assert standing.name == name
            assert standing.load(1, 1).requests > 0
