"""What the tests of the HTTP service do over and over."""

from __future__ import annotations

import time

import numpy as np


def as_rows(x, names="abcd"):
    return [dict(zip(names, row, strict=True)) for row in x.tolist()]


def healthy(server):
    answer = server.client.post("/v1/predict", json={"rows": as_rows(np.zeros((1, 4)))})
    return answer.status_code == 200


def poll(ask, wanted, seconds=30):
    deadline = time.monotonic() + seconds
    while not wanted(value := ask()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert wanted(value), value
    return value
