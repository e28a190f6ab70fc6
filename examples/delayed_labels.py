"""Labels that come later, drift and alerts: the whole loop, with real processes on this machine.

The frozen model of desert.py names rodents in traps. It is served and asked over HTTP, and half of
its answers get their label later. Then it is asked about animals caught since 2000, many of them of
a species that it does not know: the monitor tells before any label comes, and Prometheus, where it
is installed, says which alerts fire. Whatever happens, every process is stopped in the end.

    python examples/delayed_labels.py [--out FOLDER]
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import desert
import pyarrow.parquet as pq
import shared

import hedged

HEDGED = (sys.executable, "-m", "hedged")
MONITOR = (*HEDGED, "monitor", "hedged-ledger.sqlite", "--reference", "1000", "--lag", "0")
PROMETHEUS = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
scrape_configs:
  - {{job_name: hedged, static_configs: [{{targets: ["{server}"]}}]}}
  - {{job_name: hedged-monitor, static_configs: [{{targets: ["{monitor}"]}}]}}
"""


def start(stack: ExitStack, out: Path, name: str, *command: str) -> str:
    """Start a command in ``out`` that ends with ``stack``, on a free port in place of its {}; what
    it says goes to NAME.log. Its address."""
    held = stack.enter_context(socket.socket())  # nobody else gets the port meanwhile
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    with (out / f"{name}.log").open("wb") as log:
        words = [word.replace("{}", str(port)) for word in command]
        process = subprocess.Popen(words, cwd=out, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return f"127.0.0.1:{port}"


def ask(url: str, body: str = "", kind: str = "application/json") -> Any:
    """POST ``body``, or GET where there is none; the JSON that is answered."""
    request = urllib.request.Request(f"http://{url}", body.encode() or None, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def until(true: Callable[[], Any], what: str) -> Any:
    """What ``true`` gives as soon as it is something; TimeoutError after two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError):  # nobody listens yet
            if found := true():
                return found
        time.sleep(0.1)  # only how often to look
    raise TimeoutError(f"no {what} in two minutes; see the logs")


def counted(server: str, what: str, n: int) -> Any:
    """What the ledger knows, once it has ``n`` rows that are ``served``, or ``labelled``."""
    return until(
        lambda: [m for m in ask(f"{server}/v1/calibration")["models"] if m[what] == n],
        f"{n} rows {what}",
    )[0]


def evidence(out: Path) -> str:
    """What `hedged monitor` has found in the streams of the ledger until now."""
    done = subprocess.run([*MONITOR, "--once", "--json"], cwd=out, check=True, capture_output=True)
    streams = json.loads(done.stdout)["streams"]
    return ", ".join(f"{s['stream']} {s['log10_martingale']:.1f}" for s in streams)


def firing(stack: ExitStack, out: Path, server: str) -> list[str]:
    """A line for each alert of `hedged alerting rules` that a Prometheus of this machine fires."""
    rules = ("alerting", "rules", "--windows", "10s", "--alert-windows", "10s", "--interval", "1s")
    subprocess.run([*HEDGED, *rules, "--out", "rules.yml"], cwd=out, check=True)
    if shutil.which("prometheus") is None:
        return ["Prometheus is not installed; its rules are in rules.yml"]
    monitor = start(stack, out, "monitor", *MONITOR, "--port", "{}")
    (out / "prometheus.yml").write_text(PROMETHEUS.format(server=server, monitor=monitor))
    own = ("--web.listen-address=127.0.0.1:{}", "--storage.tsdb.path=prometheus")
    here = start(stack, out, "prometheus", "prometheus", "--config.file=prometheus.yml", *own)

    def fire() -> Any:
        found = ask(f"{here}/api/v1/alerts")["data"]["alerts"]
        return {one["annotations"]["summary"] for one in found if one["state"] == "firing"}

    return [f"alert: {one}" for one in sorted(until(fire, "alert"))]


def main(out: Path) -> None:
    """Fit, serve, ask, label, watch; then the same with animals caught since 2000."""
    desert.main(out)
    hedged.fit(
        "desert:network",
        out / "held-out.parquet",
        out / "bundle",
        task="classification",
        target="species_id",
        inputs={"input": desert.INPUTS},
        id="id",
        classes=desert.SPECIES,
        name="rodents",
        source={"checkpoint": out / "network.safetensors", "cache_dir": out / "cache"},
    )
    served = labelled = covered = 0
    with ExitStack() as stack:
        server = start(stack, out, "server", *HEDGED, "serve", "bundle", "--port", "{}")
        until(lambda: ask(f"{server}/v2/health/ready"), "server")
        for period in ("before", "since"):
            rows = pq.read_table(out / f"{period}.parquet")
            asked = rows.select(["id", *desert.INPUTS]).to_pylist()
            body = json.dumps({"rows": asked, "outputs": ["ood"]})
            made = ask(f"{server}/v1/predict", body)["predictions"]
            served += len(made)
            counted(server, "served", served)
            strange = sum(one["ood"] for one in made) / len(made)
            print(f"{period}: {strange:.4f} of {len(made)} predictions flagged as strange")
            print(f"{period}: evidence of drift, powers of ten: {evidence(out)}")
            if period == "since":
                print(*firing(stack, out, server), sep="\n")
            # Days later half of them are named by somebody who had the animal in hand.
            named = zip(rows["id"].to_pylist(), rows["species_id"].to_pylist(), strict=True)
            half = [json.dumps({"id": id, "label": name}) for id, name in named][::2]
            results = ask(f"{server}/v1/labels", "\n".join(half), "application/x-ndjson")["counts"]
            print(f"{period}: labels", *(f"{result} {n}" for result, n in results.items()))
            known = counted(server, "labelled", labelled + results["accepted"])
            inside = known["coverage"]["0.9"]["covered"] - covered
            share = inside / results["accepted"]
            print(f"{period}: coverage at level 0.9 {share:.4f} of {results['accepted']} labels")
            labelled, covered = labelled + results["accepted"], covered + inside
            if "invalid" in results:  # the ledger takes only classes that the model has
                print(f"{period}: the truth of {results['invalid']} is a species it cannot say")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that all is stopped
    shared.run(main, __doc__)
