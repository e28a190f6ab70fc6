"""``hedged keys``: a key is shown once, the file holds its hash, and mistakes are named."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from tests.hedged.conftest import Call, assert_one_line


def test_a_key_is_shown_once_and_kept_as_a_hash(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys.json"
    made = call("keys", "add", file, "ci", "--role", "labels,predict")
    assert made.code == 0, made.err
    token = made.out.removesuffix("\n")
    assert token.startswith("hedged_") and len(token) >= 50 and "\n" not in token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (kept,) = json.loads(file.read_text())["keys"]
    assert kept["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    assert kept["name"] == "ci" and kept["roles"] == ["predict", "labels"]
    other = call("keys", "add", file, "prom", "--role", "metrics", "--json")
    assert other.json["key"] != token and other.json["roles"] == ["metrics"]
    listed = call("keys", "list", file)
    assert "ci" in listed.out and "prom" in listed.out
    assert token not in listed.out and kept["sha256"] not in listed.out
    assert [k["name"] for k in call("keys", "list", file, "--json").json["keys"]] == ["ci", "prom"]
    assert call("keys", "revoke", file, "ci").code == 0
    assert [k["name"] for k in call("keys", "list", file, "--json").json["keys"]] == ["prom"]
    assert [p.name for p in file.parent.iterdir()] == ["keys.json"]


def test_the_mode_of_a_file_that_exists_is_kept(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert call("keys", "add", file, "a", "--role", "admin").code == 0
    file.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    assert call("keys", "add", link, "b", "--role", "admin").code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and link.is_symlink()
    assert len(json.loads(file.read_text())["keys"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("add", "FILE", "a"), 2, "--role"),
        (("add", "FILE", "--role", "predict"), 2, "NAME"),
        (("add", "FILE", "a", "--role", "preditc"), 2, "preditc"),
        (("add", "FILE", "a b", "--role", "predict"), 2, "a b"),
        (("list", "FILE", "a"), 2, "NAME"),
        (("revoke", "FILE", "a", "--role", "predict"), 2, "--role"),
        (("rotate", "FILE"), 2, "rotate"),
    ],
)
def test_wrong_usage_is_named(
    call: Call, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    file = tmp_path / "keys.json"
    done = call("keys", *(file if a == "FILE" else a for a in arguments))
    assert (done.code, says in done.err) == (code, True), done.err
    assert not file.exists()


def test_what_can_be_mended_is_one_line(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert_one_line(call("keys", "list", file), str(file))
    assert call("keys", "add", file, "a", "--role", "predict").code == 0
    assert_one_line(call("keys", "add", file, "a", "--role", "predict"), "revoke it first")
    assert_one_line(call("keys", "revoke", file, "b"), "no key 'b'")
    secret = "hedged_this-is-no-hash"
    text = {"name": "a", "roles": ["predict"], "sha256": secret, "created": "2025-01-01T00:00:00Z"}
    file.write_text(json.dumps({"keys": [text]}))
    pasted = call("keys", "list", file)
    assert pasted.code == 1 and "sha256" in pasted.err and secret not in pasted.err
