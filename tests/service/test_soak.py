"""A real server that answers for long: what it holds in memory stays the same."""

from __future__ import annotations

import json

import psutil
import pytest

from bench.wrk import wrk
from tests.service.conftest import BentoServer

BODY = json.dumps({"rows": [dict.fromkeys("abcd", 0.5)] * 4}).encode()
GROWTH = 1.05


def ask(server: BentoServer, least: int) -> int:
    """At least so many requests on 16 connections, with the ledger and the metrics on."""
    url, done = f"http://127.0.0.1:{server.port}/v1/predict", 0
    while done < least:
        done += wrk(url, BODY, 16, 5).requests
    return done


def resident(server: BentoServer) -> int:
    """Bytes of the server's process and its workers."""
    processes = [server.process, *server.process.children(recursive=True)]
    return sum(p.memory_info().rss for p in processes)


def stays(bundle, home, warm, requests):
    with BentoServer(home, HEDGED_BUNDLES=str(bundle), HEDGED_THREADS="1") as server:
        assert psutil.pid_exists(server.process.pid)
        ask(server, warm)
        before = resident(server)
        ask(server, requests)
        after = resident(server)
    assert after < GROWTH * before, (before, after)


def test_memory_stays_over_some_thousand_requests(classifier, tmp_path):
    stays(classifier, tmp_path, 10_000, 10_000)


@pytest.mark.long
def test_memory_stays_over_a_hundred_thousand_requests(classifier, tmp_path):
    stays(classifier, tmp_path, 20_000, 100_000)
