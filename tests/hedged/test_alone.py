"""What a server and a demo leave alone: another's metrics, and nothing that runs on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from posthoc.contract import HedgedError
from service.lock import locked
from tests.hedged.conftest import Call, assert_one_line
from tests.ports import held_port
from tests.service.helpers import poll

# The demo without its story: a server stands in a context, and the demo waits for it.
DEMO = """
import subprocess, sys
from hedged import cli
from hedged.demo import story

class Server(subprocess.Popen):
    def __exit__(self, *error):
        self.terminate()
        super().__exit__(*error)

def tell(*_, **__):
    with Server([sys.executable, "-c", "import time; time.sleep(600)"]) as server:
        print(server.pid, flush=True)
        server.wait()

story.tell = tell
sys.argv = ["hedged", "demo", "--keep-serving"]
cli.main()
"""


def test_a_second_server_leaves_the_metrics_of_the_first(
    call: Call, classification_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENTOML_HOME", raising=False)
    home = tmp_path / ".bentoml"
    home.mkdir()
    counted = home / "prometheus_multiproc_dir" / "counter_1.db"
    counted.parent.mkdir()
    counted.write_bytes(b"of the first")
    lock = locked(home / "hedged.lock", HedgedError("held"), make=True)
    with held_port() as port, lock:
        done = call("serve", classification_bundle, "--port", port, "--data-dir", tmp_path)
    shown = done._replace(err="\n".join(done.err.splitlines()[-1:]))
    assert_one_line(shown, "another server keeps its metrics in")
    assert "--data-dir (and --ledger for the same ledger)" in done.err
    assert counted.read_bytes() == b"of the first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_ended_ends_its_server(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEMO], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        server = psutil.Process(int(demo.stdout.readline()))
        demo.send_signal(number)
        assert demo.wait(60) == 128 + number
    poll(server.is_running, lambda running: not running)
