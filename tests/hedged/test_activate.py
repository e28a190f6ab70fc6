"""``hedged activate``: what becomes live, what is listed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.bundle import load_bundle
from service.bundles import find_bundles, write_active
from tests.factory import version_of
from tests.hedged.conftest import Call, assert_one_line


@pytest.fixture
def root(classification_bundle: Path, tmp_path: Path) -> Path:
    """Versions 1 and 2 of ``credit``, and of ``risk`` version 1; nothing says what is live."""
    root = tmp_path / "models"
    for name, version in (("credit", "1"), ("credit", "2"), ("risk", "1")):
        version_of(classification_bundle, root, name, version)
    return root


def test_a_version_becomes_live(call: Call, root: Path) -> None:
    first = call("activate", root, "credit", "1")
    assert first.code == 0, first.err
    assert "credit: version 1 is live (none was)" in first.out
    assert find_bundles(root)["credit"] == root / "credit" / "1"
    second = call("activate", root, "credit", "2")
    assert "credit: version 2 is live (was 1)" in second.out
    assert json.loads((root / "credit" / "active.json").read_text()) == {"version": "2"}
    assert sorted(p.name for p in (root / "credit").iterdir()) == ["1", "2", "active.json"]
    back = call("activate", root, "credit", "1", "--json")
    assert back.json == {
        "name": "credit",
        "version": "1",
        "previous": "2",
        "identity": load_bundle(root / "credit" / "1").identity,
    }
    # Of a broken file nothing was live, and it is mended.
    (root / "credit" / "active.json").write_text("{")
    assert call("activate", root, "credit", "2", "--json").json["previous"] is None
    assert find_bundles(root)["credit"] == root / "credit" / "2"


def test_versions_are_listed(call: Call, root: Path) -> None:
    before = call("activate", root, "credit")
    assert (before.code, before.out.split()) == (0, ["1", "2"])
    assert "none is live" in before.err and "no active.json" in before.err
    write_active(root / "credit", "2")
    assert call("activate", root, "credit").out.split() == ["1", "2", "live"]
    assert call("activate", root, "credit", "--json").json == {
        "name": "credit",
        "live": "2",
        "versions": ["1", "2"],
    }
    assert call("activate", root, "risk", "--json").json["live"] == "1"  # the only one


def test_what_is_not_there_is_named(call: Call, root: Path, tmp_path: Path) -> None:
    assert_one_line(
        call("activate", root, "debit", "1"), "no model 'debit'; there are credit, risk"
    )
    assert_one_line(call("activate", root, "debit"), "no model 'debit'; there are credit, risk")
    assert_one_line(call("activate", root, "credit", "3"), "no version '3'; there are 1, 2")
    assert_one_line(call("activate", root, "credit", "../1"), "no version '../1'; there are 1, 2")
    assert_one_line(call("activate", tmp_path / "none", "credit", "1"), "no such folder")
    assert_one_line(call("activate", root / "credit" / "1", "credit", "1"), "is one bundle and not")
    assert not list(root.rglob("active.json"))


@pytest.mark.parametrize("kind", ["damaged", "lying", "elsewhere"])
def test_what_fails_its_check_stays_inactive(
    call: Call, root: Path, classification_bundle: Path, kind: str
) -> None:
    write_active(root / "credit", "1")
    if kind == "elsewhere":
        version_of(classification_bundle, root, "credit", "4").rename(root / "credit" / "3")
    else:
        bad = version_of(classification_bundle, root, "credit", "3", golden=kind != "lying")
    if kind == "damaged":
        (bad / "predictor.onnx").write_bytes(b"changed")
    says = {
        "damaged": "predictor.onnx was changed",
        "lying": "golden rows do not reproduce",
        "elsewhere": "is version '4' of 'credit'; rename the folder to that",
    }
    assert_one_line(call("activate", root, "credit", "3"), says[kind])
    assert find_bundles(root)["credit"] == root / "credit" / "1"


def test_a_root_that_cannot_be_written_is_named(call: Call, root: Path) -> None:
    # A folder in the file's place: who may write anywhere cannot write that either.
    (root / "credit" / "active.json").mkdir()
    assert_one_line(call("activate", root, "credit", "1"), "active.json cannot be written")
    assert sorted(p.name for p in (root / "credit").iterdir()) == ["1", "2", "active.json"]
