"""Versions of a root are switched while requests are answered, and refused when they are broken."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import httpx
import numpy as np
import psutil
import pytest

from calibration.bundle import load_bundle
from calibration.predictor import Predictor
from service.bundles import write_active
from service.settings import Settings
from tests.factory import CLASSES, rows, version_of
from tests.service.conftest import ROOT, Server
from tests.service.helpers import poll
from tests.service.streams import Exposition

X = rows("classification", 40, 3)[0]


def metrics(server):
    return Exposition(server.client.get("/metrics").text)


def served_version(server, name):
    return server.client.get(f"/v2/models/{name}").raise_for_status().json()["versions"][0]


def switch(server, root, name, version):
    write_active(root / name, version)
    poll(lambda: served_version(server, name), lambda v: v == version)


def ask(client, name, x, outputs=("probs",), id=None):
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}],
        "outputs": [{"name": o} for o in outputs],
        **({} if id is None else {"id": id}),
    }
    return client.post(f"/v2/models/{name}/infer", json=body)


def test_versions_are_switched_under_load_and_no_request_fails(versions, tmp_path):
    name = "loaded"
    where = versions(name)
    want = {v: Predictor(where / name / v).run({"x": X})["probs"] for v in ("1", "2")}
    # Batches have many shapes, across which a graph's own numbers move by less than 1e-5: rows are
    # asked for that tell the versions apart by more.
    telling = np.flatnonzero(abs(want["1"] - want["2"]).max(axis=1) > 1e-4)
    assert len(telling) > 20
    stop = threading.Event()
    answers: list[tuple[int, str, float]] = []

    def load(k):
        rng = np.random.default_rng(k)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
            while not stop.is_set():
                at = rng.choice(telling, int(rng.integers(1, 20)))
                answer = ask(client, name, X[at])
                if answer.status_code != 200:
                    answers.append((answer.status_code, answer.text, 0))
                    continue
                got = answer.json()
                version = got["model_version"]
                probs = np.array(got["outputs"][0]["data"]).reshape(-1, 3)
                answers.append((200, version, float(abs(probs - want[version][at]).max())))

    settings = Settings(bundles=where, data_dir=tmp_path, poll_s=0.05)
    with Server(settings) as server:
        first = weakref.ref(server.app.core.models[name].predictor.session)
        threads = [threading.Thread(target=load, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        try:
            for version in ("2", "1", "2"):
                switch(server, where, name, version)
                seen = len(answers)
                poll(lambda: len(answers), lambda n, seen=seen: n > seen + 50)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert {status for status, _, _ in answers} == {200}, [a for a in answers if a[0] != 200]
        assert {version for _, version, _ in answers} == {"1", "2"}
        assert max(off for _, _, off in answers) < 1e-5
        poll(lambda: (gc.collect(), first())[1], lambda session: session is None)
        x = metrics(server)
        assert x.total("uq_swaps_total", model=name, result="ok") == 3
        assert x.total("uq_swaps_total", model=name, result="failed") == 0
        info = x.values("uq_model_info", model=name)
        assert [(dict(k)["version"], v) for k, v in info.items()] == [("2", 1)]
        n = load_bundle(where / name / "2").manifest.conformal.guarantees[0].n
        found = x.values("uq_conformal_rows", model=name)
        assert [(dict(k)["version"], v) for k, v in found.items()] == [("2", n)]
        # The old version is known no more by its address, and its series stay for late labels.
        assert server.client.get(f"/v2/models/{name}/versions/1").status_code == 404
        assert server.client.get(f"/v2/models/{name}/versions/1/ready").status_code == 404
        old = ask(server.client, f"{name}/versions/1", X[:1])
        assert (old.status_code, "'2', not '1'" in old.json()["error"]) == (404, True)
        assert ask(server.client, f"{name}/versions/2", X[:1]).status_code == 200
        assert x.total("uq_predictions_total", model=name, version="1") > 0


def test_labels_of_the_old_version_count_under_it(versions, regressor, tmp_path):
    name, n = "labelled", 30
    where = versions(name)
    version_of(regressor, where, name, "3")
    y = rows("classification", n, 3)[1]
    target = rows("regression", n, 3)

    def label(prefix, values):
        items = [{"id": f"{prefix}:{i}", "label": v, "model": name} for i, v in enumerate(values)]
        return server.client.post("/v1/labels", json=items).raise_for_status().json()["counts"]

    def labelled(version):
        found = metrics(server).values("uq_labeled_predictions_total", model=name, version=version)
        return sum(found.values())

    settings = Settings(bundles=where, data_dir=tmp_path, poll_s=0.05)
    with Server(settings) as server:
        before = ask(server.client, name, X[:n], ("label",), "before").json()
        assert before["model_version"] == "1"
        switch(server, where, name, "3")  # another task, other inputs
        after = ask(server.client, name, target[0], ("mean",), "after").json()
        assert after["model_version"] == "3"
        assert set(label("before", [CLASSES[k] for k in y])) <= {"accepted", "pending"}
        assert set(label("after", target[1].tolist())) <= {"accepted", "pending"}
        poll(lambda: (labelled("1"), labelled("3")), lambda counts: counts == (n, n))
        x = metrics(server)
        right = int((np.array(before["outputs"][0]["data"]) == y).sum())
        assert x.total("uq_labeled_correct_total", model=name, version="1") == right
        assert not x.values("uq_labeled_predictions_total", model=name, version="2")
        known = server.client.get("/v1/calibration", params={"model": name}).json()["models"]
        found = {m["version"]: (m["task"], m["labelled"]) for m in known}
        assert found == {"1": ("classification", n), "3": ("regression", n)}
        assert next(m for m in known if m["version"] == "1")["accuracy"] == pytest.approx(right / n)


def test_a_refusal_is_told_by_the_models_metadata(versions, tmp_path):
    where = versions("told")
    with Server(Settings(bundles=where, data_dir=tmp_path, poll_s=0.05)) as server:

        def error():
            answer = server.client.get("/v2/models/told").raise_for_status().json()
            assert answer["versions"] == ["1"]
            return answer["parameters"]["swap_error"]

        assert error() is None
        write_active(where / "told", "3")
        assert "names version '3'" in poll(error, lambda e: e is not None)
        assert ask(server.client, "told", X).status_code == 200
        write_active(where / "told", "1")
        poll(error, lambda e: e is None)


def watchers():
    return sum(t.name == "hedged-live" for t in threading.enumerate())


def test_only_a_root_is_watched(classifier, versions, tmp_path):
    before = watchers()
    with Server(Settings(bundles=classifier, data_dir=tmp_path / "one")):
        assert watchers() == before
    with Server(Settings(bundles=versions("watched"), data_dir=tmp_path / "many")):
        assert watchers() == before + 1
    assert watchers() == before


class Worker:
    """Our application in a process of its own, one of several that count into one folder."""

    def __init__(self, root, folder):
        environ = {
            "HEDGED_BUNDLES": str(root),
            "HEDGED_DATA_DIR": str(folder),
            "HEDGED_POLL_S": "0.05",
            "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HEDGED_", "PROMETHEUS_"))}
        self.process = psutil.Popen(
            [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app", "--port", "0"],
            env=kept | environ,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )

    def start(self):
        (self.port,) = poll(self._ports, lambda ports: len(ports) == 1, 60)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def end(self):
        if hasattr(self, "client"):
            self.client.close()
        self.process.terminate()
        self.process.wait(60)

    def _ports(self):
        assert self.process.poll() is None
        found = self.process.net_connections("tcp4")
        return [c.laddr.port for c in found if c.status == psutil.CONN_LISTEN]


def test_two_workers_switch_each_by_itself(versions, tmp_path):
    where, name = versions("both"), "both"
    (tmp_path / "metrics").mkdir()
    workers = [Worker(where, tmp_path) for _ in range(2)]

    def seen():
        """Swaps of both, the versions that any of them says it serves, and what each does."""
        x = metrics(workers[0])
        counts = tuple(x.total("uq_swaps_total", model=name, result=r) for r in ("ok", "failed"))
        info = {dict(k)["version"]: v for k, v in x.values("uq_model_info", model=name).items()}
        answers = [ask(w.client, name, X[:2]).raise_for_status().json() for w in workers]
        return counts, info, [a["model_version"] for a in answers]

    def with_rows():
        found = metrics(workers[0]).values("uq_conformal_rows", model=name)
        return {dict(k)["version"] for k in found}

    try:
        for worker in workers:
            worker.start()
        assert seen() == ((0, 0), {"1": 1}, ["1", "1"])
        write_active(where / name, "2")
        poll(seen, lambda s: s == ((2, 0), {"2": 1}, ["2", "2"]))
        assert with_rows() == {"2"}
        write_active(where / name, "3")
        poll(seen, lambda s: s == ((2, 2), {"2": 1}, ["2", "2"]))
        # A worker that is stopped takes its mark with it, and the other still serves.
        workers.pop().end()
        write_active(where / name, "1")
        poll(seen, lambda s: s == ((3, 2), {"1": 1}, ["1"]))
        assert with_rows() == {"1"}
    finally:
        for worker in workers:
            worker.end()
