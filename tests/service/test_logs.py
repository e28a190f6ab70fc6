"""JSON lines about requests: which, what they say, and what they never say."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from service.keys import add_key
from service.logs import JsonFormatter, RequestLog
from tests.service.conftest import ROOT
from tests.service.helpers import as_rows, poll

SECRET = "row-id-of-a-client"
GOOD = {"rows": as_rows(np.full((2, 4), 0.123456)), "ids": [SECRET, f"{SECRET}-2"]}


@pytest.fixture
def lines():
    """What the ``hedged`` loggers say meanwhile, as JSON."""
    found = []

    class Kept(logging.Handler):
        def emit(self, record):
            found.append(json.loads(JsonFormatter().format(record)))

    handler, logger = Kept(), logging.getLogger("hedged")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_request_that_failed_has_a_line_without_its_input(served, lines, tmp_path):
    file = tmp_path / "keys.json"
    token = add_key(file, "ci", ["predict"])[1]
    server = served(keys=file)
    lines.clear()
    headers = {"Authorization": f"Bearer {token}", "X-Request-Id": "r-1"}
    assert server.client.post("/v1/predict", json=GOOD, headers=headers).status_code == 200
    assert server.client.get("/livez").status_code == 200
    assert lines == []
    wrong = {"rows": GOOD["rows"], "ids": [SECRET, SECRET]}
    path = "/v1/models/tiny/predict"
    assert server.client.post(path, json=wrong, headers=headers).status_code == 400
    (line,) = poll(lambda: list(lines), len)
    assert line["time"].endswith("Z")
    assert 0 < line["ms"] < 60_000
    del line["time"], line["ms"]
    assert line.pop("bytes_in") > 100
    assert line.pop("bytes_out") > 50
    assert line == {
        "level": "info",
        "logger": "hedged.requests",
        "message": "request",
        "status": 400,
        "code": "invalid_request",
        "method": "POST",
        "route": "/v1/models/{name}/predict",
        "request_id": "r-1",
        "caller": "ci",
        "model": "tiny",
        "rows": 2,
    }
    server.client.get(f"/{SECRET}", headers={"X-API-Key": f"{token}{SECRET}"})
    (_, refused) = poll(lambda: list(lines), lambda found: len(found) == 2)
    assert (refused["route"], refused["code"]) == ("other", "unauthorized")
    text = json.dumps(lines)
    assert SECRET not in text
    assert token not in text
    assert "0.123456" not in text


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({"log_requests": "all"}, [200, 404]),
        ({"log_requests": "none"}, []),
        ({"log_slow_s": 0}, [200, 404]),
        ({}, [404]),
    ],
)
def test_which_requests_have_a_line(served, lines, settings, logged):
    server = served(**settings)
    lines.clear()
    server.client.get("/livez")
    server.client.get("/nowhere")
    server.client.get("/livez")  # the line of the one before is written by now
    found = [line["status"] for line in lines if line["message"] == "request"]
    assert found[: len(logged)] == logged
    assert set(found) == set(logged)


@pytest.mark.parametrize(
    ("which", "status", "seconds", "wanted"),
    [
        ("errors", 200, 0.9, False),
        ("errors", 200, 1.0, True),
        ("errors", 400, 0.0, True),
        ("errors", 499, 0.0, True),
        ("all", 200, 0.0, True),
        ("none", 500, 9.0, False),
    ],
)
def test_wanted(which, status, seconds, wanted):
    assert RequestLog(which, slow=1.0).wants(status, seconds) is wanted


def test_a_line_is_one_line_whatever_is_said():
    try:
        raise ValueError("two\nlines \udc80")
    except ValueError:
        record = logging.getLogger("hedged.x").makeRecord(
            "hedged.x", logging.ERROR, "f", 1, "said %s\n\udcff", ("é",), sys.exc_info()
        )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "said é\n\\udcff"
    assert line["exception"].startswith("Traceback")
    assert "\\udc80" in line["exception"]


def test_a_process_of_ours_writes_json_once_and_importing_changes_nothing():
    script = """
import logging
import service.app
assert not logging.getLogger("hedged").handlers and not logging.getLogger().handlers
from service import logs
logging.basicConfig(format="twice %(message)s")
logs.setup()
logs.setup()
logging.getLogger("hedged.app").info("up")
logging.getLogger("other").warning("theirs")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    first, second = done.stderr.splitlines()
    assert json.loads(first)["message"] == "up"
    assert second == "twice theirs"
