"""wrk, the load generator: the same request over and over on so many connections."""

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

# Lua: wrk hands its totals over here; latencies are in microseconds.
_SCRIPT = """
wrk.method = "POST"
wrk.body = %s
%s
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    "RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
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
    lines = {"Content-Type": "application/json", **(headers or {})}
    script = _SCRIPT % (
        json.dumps(body.decode()),
        "\n".join(f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in lines.items()),
    )
    with tempfile.TemporaryDirectory(prefix="hedged-wrk-") as folder:
        file = Path(folder) / "load.lua"
        file.write_text(script)
        done = subprocess.run(
            [
                "wrk",
                "-t1",
                f"-c{connections}",
                f"-d{math.ceil(seconds)}s",
                "--timeout",
                "60s",
                "-s",
                str(file),
                url,
            ],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
        )
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if found is None:
        raise HedgedError(f"wrk failed: {(done.stderr or done.stdout).strip()[-400:]}")
    requests, micros, p50, p99, errors = map(int, found.groups())
    if 100 * errors > requests or not requests:
        raise HedgedError(f"{url}: {errors} of {requests} answers were no success")
    return Load(requests, errors, requests / (micros / 1e6), p50 / 1e6, p99 / 1e6)
