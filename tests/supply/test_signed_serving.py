"""A service that was told whose bundles to serve: none that is unsigned, signed by another, or not
what was signed; at its start and where a version is switched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.bundle import load_bundle, write_bundle
from calibration.signing import sign, signature_path
from service.bundles import write_active
from service.settings import Settings, load_settings
from tests.factory import tiny_bundle, version_of
from tests.hedged.conftest import Call, assert_one_line
from tests.service.conftest import BentoServer, Server
from tests.service.helpers import healthy, poll
from tests.service.streams import Exposition
from tests.supply.keys import Pair, make_pair

# Runs in every Python process of the server: what must not be loaded to verify a signature.
AUDIT = """
import os, sys
seen = os.open(os.environ["AUDIT_FILE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
FORBIDDEN = {"torch", "onnx", "sklearn", "plotly", "model_signing", "sigstore", "requests"}

def audit(event, args):
    if event == "pickle.find_class" or (event == "import" and args[0] in FORBIDDEN):
        os.write(seen, f"{event} {args[:2]}\\n".encode())
    if event == "import" and args[0] == "cryptography":
        os.write(seen, b"verifies\\n")

sys.addaudithook(audit)
"""


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("other") / "bundle", method="none")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path)


@pytest.fixture
def root(
    classification_bundle: Path, other_bundle: Path, tmp_path: Path, pair: Pair
) -> Callable[[str], Path]:
    """Makes a root of one model: version 1 is signed and live, version 2 is neither."""

    def make(name: str) -> Path:
        root = tmp_path / "root"
        sign(version_of(classification_bundle, root, name, "1"), key=pair.private)
        version_of(other_bundle, root, name, "2")
        write_active(root / name, "1")
        return root

    return make


def version(server: Server, name: str) -> str:
    found: str = server.client.get(f"/v2/models/{name}").raise_for_status().json()["versions"][0]
    return found


def problem(server: Server, name: str) -> str:
    found = server.client.get(f"/v2/models/{name}").json()["parameters"]["swap_error"]
    return found or ""


def test_a_version_is_switched_to_when_it_is_signed(
    root: Callable[[str], Path], pair: Pair, tmp_path: Path
) -> None:
    name = "signed"
    where = root(name)
    settings = Settings(bundles=where, data_dir=tmp_path, poll_s=0.05, signed_by=pair.public)
    with Server(settings) as server:
        assert version(server, name) == "1"
        write_active(where / name, "2")
        said = poll(lambda: problem(server, name), bool)
        assert "there is no signature" in said and str(tmp_path) not in said
        assert version(server, name) == "1"
        sign(where / name / "2", key=make_pair(tmp_path, "stranger").private)
        poll(lambda: problem(server, name), lambda text: "none of the trusted keys" in text)
        assert version(server, name) == "1"
        sign(where / name / "2", key=pair.private)  # that alone: the folder stays as it is
        poll(lambda: version(server, name), lambda found: found == "2")
        assert not problem(server, name)
        metrics = Exposition(server.client.get("/metrics").text)
        assert metrics.total("uq_swaps_total", model=name, result="ok") == 1
        assert metrics.total("uq_swaps_total", model=name, result="failed") == 2


def test_a_bundle_made_anew_under_a_signed_name_is_not_served(
    root: Callable[[str], Path], pair: Pair, tmp_path: Path
) -> None:
    """Who can write the root can make a bundle whose hashes hold, and not its signature."""
    name = "forged"
    where = root(name)
    settings = Settings(bundles=where, data_dir=tmp_path, poll_s=0.05, signed_by=pair.public)
    with Server(settings) as server:
        two = load_bundle(where / name / "2")
        shutil.rmtree(where / name / "1")
        forged = two.manifest.model_copy(update={"version": "1"})
        write_bundle(where / name / "1", forged, two.files)
        said = poll(lambda: problem(server, name), lambda text: "is not what" in text)
        assert "1.sig signs" in said
        identity = load_bundle(where / name / "1").identity
        assert server.app.core.models[name].identity != identity


def test_of_several_the_signed_ones_are_served(
    root: Callable[[str], Path], pair: Pair, tmp_path: Path
) -> None:
    where = root("good")
    version_of(where / "good" / "2", where, "bad", "1")
    settings = Settings(bundles=where, data_dir=tmp_path, signed_by=pair.public)
    with Server(settings) as server:
        ready = [server.client.get(f"/v2/models/{n}/ready").status_code for n in ("good", "bad")]
        assert ready[0] == 200 and ready[1] != 200


def test_a_real_server_verifies_and_loads_no_more_for_it(
    classification_bundle: Path, pair: Pair, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(classification_bundle, tmp_path / "bundle"))
    audit = tmp_path / "audit"
    audit.mkdir()
    (audit / "sitecustomize.py").write_text(AUDIT)
    environ = {
        "HEDGED_BUNDLES": str(bundle),
        "HEDGED_SIGNED_BY": str(pair.public),
        "PYTHONPATH": str(audit),
        "AUDIT_FILE": str(audit / "events"),
    }
    refused = BentoServer(tmp_path, **environ)
    with pytest.raises(AssertionError, match=r"there is no signature .*bundle\.sig"):
        refused.__enter__()
    assert refused.process.returncode not in (0, None)
    sign(bundle, key=pair.private)
    with BentoServer(tmp_path, **environ) as server:
        assert healthy(server)
    events = (audit / "events").read_text().splitlines()
    assert "verifies" in events
    assert [line for line in events if line != "verifies"] == []


def test_keys_that_cannot_be_read_end_the_start(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, says in ((tmp_path / "nowhere", "cannot be read"), (pair.private, "no public key")):
        monkeypatch.setenv("HEDGED_SIGNED_BY", str(path))
        with pytest.raises(Exception, match=f"HEDGED_SIGNED_BY: .*{says}"):
            load_settings()
    monkeypatch.setenv("HEDGED_SIGNED_BY", str(pair.public))
    assert load_settings().signed_by == pair.public


def test_a_version_is_made_live_by_who_may(
    root: Callable[[str], Path],
    pair: Pair,
    call: Call,
) -> None:
    where = root("live")
    live = where / "live" / "active.json"
    asked = ("activate", where, "live", "2", "--signed-by", pair.public)
    assert_one_line(call(*asked), "there is no signature")
    assert '"1"' in live.read_text()
    sign(where / "live" / "2", key=pair.private)
    assert signature_path(where / "live" / "2").name == "2.sig"
    assert call(*asked).code == 0
    assert '"2"' in live.read_text()


def test_serve_says_whose_bundles_it_serves(
    classification_bundle: Path, pair: Pair, tmp_path: Path
) -> None:
    from hedged.commands.serve import describe

    lines = describe(Settings(bundles=classification_bundle, signed_by=pair.public))
    assert lines[-1] == f"signed   by keys of {pair.public}"
    assert len(describe(Settings(bundles=classification_bundle))) == len(lines) - 1
