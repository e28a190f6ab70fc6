"""wrk, the load generator: the same request over and over on so many connections.

wrk's own percentiles are corrected for coordinated omission: for every answer that took longer than
two mean intervals it adds the requests that the wait held back, as if they had been sent and had
waited, too. `wrk` gives these; `latencies` has a clock of its own and tells of real requests alone.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posthoc.contract import HedgedError

# Lua: the request, and what is told at the end. Times in microseconds.
_REQUEST = """
wrk.method = "POST"
wrk.body = %s
%s
"""
_TOTALS = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    "RESULT %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""
# One thread on one connection, so that requests and answers alternate.
_CLOCK = """
local ffi = require("ffi")
ffi.cdef[[
  typedef struct { long seconds; long nanos; } hedged_time;
  int clock_gettime(int clock, hedged_time *time);
]]
local time, monotonic = ffi.new("hedged_time"), 1
local function micros()
  ffi.C.clock_gettime(monotonic, time)
  return tonumber(time.seconds) * 1e6 + tonumber(time.nanos) / 1e3
end
local text, sent, thread
took = {}
function setup(one) thread = one end
function init() text = wrk.format() end
function request() sent = micros() return text end
function response() took[#took + 1] = micros() - sent end
local totals = done
done = function(...)
  totals(...)
  io.write("TOOK " .. table.concat(thread:get("took"), " ") .. "\\n")
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw: requests a second, latencies in seconds. ``errors`` of the requests
    were no success."""

    requests: int
    errors: int
    per_second: float
    p50: float
    p99: float


def wrk(
    url: str,
    body: bytes,
    connections: int,
    seconds: float,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """POST ``body`` (text) to ``url`` on ``connections`` connections for ``seconds``, rounded up.

    Raises HedgedError where wrk cannot run, and where more than one answer in a hundred was no 2xx.
    """
    return _load(url, _run(url, body, connections, seconds, headers, _TOTALS))


def latencies(
    url: str, body: bytes, seconds: float, headers: Mapping[str, str] | None = None
) -> tuple[Load, list[float]]:
    """The same on one connection, and the seconds that each request took. Raises as `wrk`."""
    told = _run(url, body, 1, seconds, headers, _TOTALS + _CLOCK)
    load = _load(url, told)
    (line,) = (line for line in told.splitlines() if line.startswith("TOOK "))
    return load, [float(micros) / 1e6 for micros in line.split()[1:]]


def _run(
    url: str,
    body: bytes,
    connections: int,
    seconds: float,
    headers: Mapping[str, str] | None,
    script: str,
) -> str:
    """What wrk and the script print."""
    lines = {"Content-Type": "application/json", **(headers or {})}
    request = _REQUEST % (
        json.dumps(body.decode()),
        "\n".join(f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in lines.items()),
    )
    with tempfile.TemporaryDirectory(prefix="hedged-wrk-") as folder:
        file = Path(folder) / "load.lua"
        file.write_text(request + script)
        options = ["-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s", "--timeout", "60s"]
        done = subprocess.run(
            ["wrk", *options, "-s", str(file), url],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
        )
    if "RESULT" not in done.stdout:
        raise HedgedError(f"wrk failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def _load(url: str, told: str) -> Load:
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", told)
    assert found is not None, told
    requests, micros, p50, p99, errors = map(int, found.groups())
    if 100 * errors > requests or not requests:
        raise HedgedError(f"{url}: {errors} of {requests} answers were no success")
    return Load(requests, errors, requests / (micros / 1e6), p50 / 1e6, p99 / 1e6)
