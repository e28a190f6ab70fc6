"""A real ``hedged serve``: stopped under load, killed in parts, and started where it cannot."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import psutil
import pytest

from hedged.commands.serve import describe
from hedged.supervisor import supervise
from posthoc.contract import HedgedError
from service.drain import LIFELINE
from service.settings import Settings
from tests.service.conftest import ROOT, BentoServer
from tests.service.helpers import poll

BODY = json.dumps({"rows": [dict.fromkeys("abcd", 0.5)]})
HEADERS = {"Content-Type": "application/json"}
CLIENTS = 4


class HedgedServer(BentoServer):
    """``hedged serve`` in a process of its own; as `BentoServer` otherwise."""

    def __init__(self, home, bundle, *, drain_s=1.0, workers=1, **environ):
        settings = {"HEDGED_DRAIN_S": str(drain_s), "HEDGED_WORKERS": str(workers), **environ}
        super().__init__(home, **settings)
        self.command = [sys.executable, "-m", "hedged", "serve", str(bundle), "--port", "0"]

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path, body=None, connection=None):
        """Status, the parsed answer, and whether the connection ends with it."""
        conn = connection or self.connect()
        conn.request("GET" if body is None else "POST", path, body, HEADERS if body else {})
        response = conn.getresponse()
        text = response.read()
        if connection is None:
            conn.close()
        return response.status, json.loads(text), response.will_close

    def is_ready(self):
        try:
            return self.ask("/readyz")[0] == 200
        except OSError:
            return False


@dataclass
class Load:
    """What the clients of one run saw."""

    answered: int = 0
    closed: int = 0  # connections that the server asked to close
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, server, seed):
        """Opens a connection only while the server is ready, sends a few requests over it, and
        leaves it when told to; ends when the server is no longer ready."""
        rng = np.random.default_rng(seed)
        while server.is_ready():
            conn = server.connect()
            for _ in range(rng.integers(1, 30)):
                try:
                    status, _, close = server.ask("/v1/predict", BODY, conn)
                except (OSError, http.client.HTTPException) as e:
                    status, close = repr(e), True
                with self.lock:
                    self.answered += status == 200
                    self.closed += close
                    if status != 200:
                        self.failed.append(str(status))
                if close:
                    break
            conn.close()


def stopped_under_load(bundle, home, seed):
    load = Load()
    with HedgedServer(home, bundle, workers=2 if seed % 4 == 3 else 1) as server:
        clients = [
            threading.Thread(target=load.client, args=(server, 1000 * seed + k))
            for k in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        moment = int(np.random.default_rng(seed).integers(50, 1500))
        poll(lambda: load.answered, lambda n: n >= moment)
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        assert server.process.wait(60) == 0, server.log.read_text()
    assert load.failed == []
    assert load.closed  # some requests were answered in the drain
    assert not psutil.pid_exists(server.process.pid)


@pytest.mark.parametrize("seed", [0, 3])  # 3: of two workers
def test_sigterm_under_load_loses_no_request(classifier, tmp_path, seed):
    stopped_under_load(classifier, tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_sigterm_under_load_loses_no_request_at_any_moment(classifier, tmp_path, seed):
    stopped_under_load(classifier, tmp_path, seed)


def test_what_a_draining_server_says_and_a_second_signal(classifier, tmp_path):
    with HedgedServer(tmp_path, classifier, drain_s=600) as server:
        early = server.connect()
        assert server.ask("/v1/predict", BODY, early)[::2] == (200, False)
        server.process.send_signal(signal.SIGTERM)
        poll(server.is_ready, lambda ready: not ready)
        status, answer, close = server.ask("/readyz")
        assert (status, answer["error"]["code"], close) == (503, "draining", True)
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            status, answer, close = server.ask(path)
            assert (status, close) == (503, True) and "stopping" in answer["error"]
        for path, body, wanted in (
            ("/livez", None, 200),
            ("/v1/predict", BODY, 200),
            ("/v1/predict", "[", 400),
            ("/nowhere", None, 404),
        ):
            assert server.ask(path, body)[::2] == (wanted, True), path
        assert server.ask("/v1/predict", BODY, early)[::2] == (200, True)
        early.close()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    said = [x for x in server.log.read_text().splitlines() if x.startswith("hedged:")]
    assert said == [
        "hedged: ready",
        "hedged: stopping: not ready, answers for another 600 s (again to skip that)",
        "hedged: stopped",
    ]


def test_a_killed_worker_comes_back_and_a_killed_server_leaves_no_orphan(classifier, tmp_path):
    with HedgedServer(tmp_path, classifier, workers=2, drain_s=600) as server:
        first, second = poll(server.workers, lambda found: len(found) == 2)
        poll(lambda: server.log.read_text().count("initialized"), lambda n: n == 2)
        first.kill()
        first.wait(60)
        for _ in range(50):
            assert server.is_ready()
            assert server.ask("/v1/predict", BODY)[0] == 200
        workers = poll(server.workers, lambda found: len(found) == 2)
        assert first not in workers and second in workers
        # Nobody but the new one is left to answer; until it is ready the connection waits.
        second.kill()
        second.wait(60)
        assert server.ask("/v1/predict", BODY)[0] == 200
        assert server.is_ready()
        assert_all_end_with(server, server.process, -signal.SIGKILL)


def test_workers_end_when_their_parent_was_killed(classifier, tmp_path):
    with HedgedServer(tmp_path, classifier, drain_s=600) as server:
        (parent,) = server.process.children()
        assert_all_end_with(server, parent, 128 + signal.SIGKILL)


def assert_all_end_with(server, victim, code):
    below = server.process.children(recursive=True)
    assert len(below) >= 2
    victim.kill()
    assert server.process.wait(60) == code
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
    with socket.socket() as s:  # the port is free
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", server.port))


def serve(home, *arguments, **environ):
    server = HedgedServer(home, *arguments, **environ)
    return subprocess.run(
        server.command, env=server.environ, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def assert_refused(done, message):
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hedged: ") and message in last


def test_a_damaged_bundle_is_refused_at_the_start(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "bundle")
    (tmp_path / "bundle" / "predictor.onnx").write_bytes(b"changed")
    done = serve(tmp_path, tmp_path / "bundle")
    assert_refused(done, "the server did not start: ")
    assert_refused(done, "predictor.onnx was changed")


def test_workers_that_cannot_start_end_the_server(classifier, tmp_path):
    """Device 99 exists on no machine, and only a worker finds out."""
    done = serve(tmp_path, classifier, HEDGED_DEVICE="cuda:99")
    assert_refused(done, "cuda:99")


def test_a_taken_port_is_refused_at_once(classifier, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        server = HedgedServer(tmp_path, classifier)
        server.command[-1] = str(port)
        done = subprocess.run(server.command, env=server.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"hedged: cannot listen on 127.0.0.1:{port} (Address already in use); see --host, --port"
    ]


def test_what_is_served_is_said_at_the_start(classifier, tmp_path):
    base = {"bundles": classifier, "data_dir": tmp_path}
    assert describe(Settings(**base)) == [
        "address  http://127.0.0.1:3000",
        f"models   tiny 1 in {classifier}",
        "device   cpu, CPUExecutionProvider; workers: 1, threads of each: one per core",
        f"ledger   sqlite:///{tmp_path}/hedged-ledger.sqlite",
        "access   no keys: this machine only",
    ]
    ledger = "postgresql://me:secret@127.0.0.1:1/x"
    lines = describe(Settings(**base, threads=1, workers=3, ledger=ledger))
    assert lines[2:4] == [
        "device   cpu, CPUExecutionProvider; workers: 3, threads of each: 1",
        "ledger   postgresql://me:***@127.0.0.1:1/x",
    ]
    cores = len(os.sched_getaffinity(0))
    shares = [Settings(workers=n).model_threads for n in (1, 2, 64)]
    assert shares == [0, max(1, cores // 2), max(1, cores // 64)]


# The supervisor over other processes than BentoML's


def run(script, said=None, **options):
    return supervise(
        [sys.executable, "-c", script],
        **{"drain_s": 0.0, "workers": 2, **options},
        say=(said if said is not None else []).append,
    )


def test_the_exit_code_is_the_servers():
    assert run("raise SystemExit(7)") == 7
    assert run("import os; os.kill(os.getpid(), 9)") == 137
    assert LIFELINE not in os.environ


def test_workers_that_end_while_they_load_are_not_started_for_ever():
    report = f"import os, time; fd = int(os.environ[{LIFELINE!r}].split()[0])\n"
    forever = "while True: time.sleep(1)\n"
    with pytest.raises(HedgedError, match="end while they load"):
        run(report + "for _ in range(5): os.write(fd, b'starting\\n')\n" + forever)
    said: list[str] = []
    once_ready = report + "os.write(fd, b'starting\\nready\\n' + b'starting\\nfailed\\n' * 9)\n"
    assert run(once_ready + "time.sleep(0.1); raise SystemExit(3)", said) == 3
    assert said == ["ready"]
