"""The CPU image, installed as the Dockerfile says from its lock file, serves a bundle; beyond its
two writable places it writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from calibration.predictor import Predictor
from deploy.image_size import installed, locked, missing
from tests.factory import rows
from tests.service.conftest import BentoServer
from tests.supply.dockerfile import ROOT, read
from tests.supply.image import Image, build

pytestmark = pytest.mark.long

ABSENT = ("torch", "onnx", "onnxscript", "sklearn", "plotly", "pip", "setuptools", "pytest")

# Runs in every Python process of the server: writes down each file that is written elsewhere.
AUDIT = """
import os, sys
seen = os.open(os.environ["AUDIT_FILE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
allowed = (os.environ["WRITABLE"] + "/", "/dev/", "/proc/")
events = {"os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod"}

def audit(event, args):
    writes = event in events or event == "sqlite3.connect"
    if event == "open" and isinstance(args[2], int):
        writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.startswith(allowed) and args[0] != ":memory:":
            os.write(seen, f"{event} {path}\\n".encode())

sys.addaudithook(audit)
os.write(seen, b"watched\\n")
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build("cpu", tmp_path_factory.mktemp("image"))


def test_exactly_the_locked_packages_are_there(image: Image) -> None:
    lock = locked(ROOT / "deploy/locks/serve-cpu.txt")
    packages = installed(image.site)
    assert missing(packages, lock) == []
    assert {p.name for p in packages} == {*lock, "hedged"}
    for name in ABSENT:
        done = subprocess.run([image.python, "-I", "-c", f"import {name}"], capture_output=True)
        assert f"No module named '{name}'".encode() in done.stderr, name
    subprocess.run([image.python, "-I", "-c", "import onnxruntime, pg8000"], check=True)


def test_its_size_is_told(image: Image) -> None:
    lock = ROOT / "deploy/locks/serve-cpu.txt"
    command = [sys.executable, ROOT / "deploy/image_size.py", "--lock", lock, "--json"]
    done = subprocess.run(
        [*command, "--site", image.site], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    hedged = next(p.bytes for p in installed(image.site) if p.name == "hedged")
    on_disk = sum(p.stat().st_size for p in image.site.rglob("*") if p.is_file())
    assert told["missing"] == []
    # Beside the packages there are a few files of nobody: scripts, and what pip itself left.
    assert 0.98 * on_disk < told["bytes"] + hedged < 1.02 * on_disk
    assert told["bytes"] < 700e6


class Served(BentoServer):
    """``hedged serve`` of the image, begun as the image begins it."""

    def __init__(self, image: Image, bundle: Path, home: Path) -> None:
        super().__init__(home)
        made = read()
        program, *words = made.last("cpu", "ENTRYPOINT").words
        self.command = [str(image.python.parent / program), *words, str(bundle)]
        audit = home / "audit"
        audit.mkdir()
        (audit / "sitecustomize.py").write_text(AUDIT)
        (home / "writable").mkdir()
        self.events = audit / "events"
        self.cwd = home / "writable" / "data"  # what /data stands for, where the image begins
        self.environ = image.environment(home / "writable") | {
            "HEDGED_HOST": "127.0.0.1",
            "HEDGED_PORT": "0",
            "PYTHONPATH": str(audit),
            "AUDIT_FILE": str(self.events),
            "WRITABLE": str(home / "writable"),
        }


@pytest.fixture(scope="module")
def served(
    image: Image, classification_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with Served(image, classification_bundle, tmp_path_factory.mktemp("served")) as served:
        yield served


def test_it_predicts_what_the_bundle_predicts(served: Served, classification_bundle: Path) -> None:
    x = rows("classification", 4, 11)[0]
    answer = served.client.post("/v1/predict", json={"inputs": {"x": x.tolist()}})
    assert answer.status_code == 200, answer.text
    got = [row["confidence"] for row in answer.json()["predictions"]]
    want = Predictor(classification_bundle).run({"x": x})["confidence"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    # A label goes into the ledger, which lies in /data.
    label = {"id": answer.json()["predictions"][0].get("id", answer.json().get("id")), "label": "a"}
    assert served.client.post("/v1/labels", json=label).status_code in {200, 202}


def test_the_health_check_knows_a_server_from_none(served: Served, image: Image) -> None:
    _, program, *words = read().last("cpu", "HEALTHCHECK").words
    command = [str(image.python.parent / program), *words]
    for port, healthy in ((served.port, True), (1, False)):
        environ = served.environ | {"HEDGED_PORT": str(port)}
        done = subprocess.run(command, env=environ, capture_output=True, timeout=60)
        assert (done.returncode == 0) is healthy


def test_it_writes_to_its_two_places_only_and_tells_nobody(
    served: Served, image: Image, classification_bundle: Path
) -> None:
    events = served.events.read_text().splitlines()
    assert events.count("watched") >= 2  # the command and its worker
    assert [line for line in events if line != "watched"] == []
    assert [p.name for p in (served.home / "writable" / "data").glob("*.sqlite")] != []
    home = Path(served.environ["HOME"])
    assert list(home.iterdir()) == []
    # A process that does is seen, by Python or not: this ONNX Runtime does where it may.
    told = {k: v for k, v in served.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    opens = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"
    model = classification_bundle / "head.onnx"
    subprocess.run([image.python, "-c", opens, model], env=told, check=True)
    assert [p.name for p in home.rglob("deviceid")] == ["deviceid"]
    outside = served.home / "outside"
    subprocess.run(
        [image.python, "-c", "import sys; open(sys.argv[1], 'w')", outside],
        env=served.environ,
        check=True,
    )
    assert f"open {outside}" in served.events.read_text().splitlines()
