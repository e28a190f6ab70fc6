"""Signatures beside bundles. Model Signing's own verifier is the other judge: what it refuses we
refuse, and of its signatures we take each."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import verifying
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from calibration.bundle import CONFORMAL, Bundle, load_bundle, write_bundle
from calibration.signing import (
    KeyFileError,
    SignatureError,
    check_certified,
    check_signature,
    load_signed,
    read_public_keys,
    sign,
    signature_path,
)
from tests.hedged.conftest import Call, assert_one_line
from tests.supply import keys
from tests.supply.keys import Pair, make_pair


@pytest.fixture
def bundle(classification_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classification_bundle, tmp_path / "bundle"))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path)


def peer(bundle: Path, public: Path, signature: Path | None = None) -> bool:
    """Whether Model Signing itself takes the signature."""
    config = verifying.Config().use_elliptic_key_verifier(public_key=public)
    try:
        config.verify(bundle, signature or signature_path(bundle))
    except Exception:  # whatever it is
        return False
    return True


def listing(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("curve", keys.CURVES)
def test_a_signed_bundle_is_known_by_its_key(bundle: Path, tmp_path: Path, curve: str) -> None:
    pair = make_pair(tmp_path, curve=curve)
    before = listing(bundle)
    assert sign(bundle, key=pair.private) == tmp_path / "bundle.sig"
    assert listing(bundle) == before
    assert load_signed(bundle, pair.public).identity == load_bundle(bundle).identity
    assert peer(bundle, pair.public)
    # The name of the folder is not signed: a bundle is served from ROOT/<name>/<version>/.
    moved = bundle.rename(tmp_path / "7")
    (tmp_path / "bundle.sig").rename(tmp_path / "7.sig")
    load_signed(moved, pair.public)
    assert peer(moved, pair.public)


def test_one_of_several_keys_is_enough_and_is_named(bundle: Path, tmp_path: Path) -> None:
    pairs = [make_pair(tmp_path, f"k{i}", curve) for i, curve in enumerate(keys.CURVES)]
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(b"of the team\n".join(p.public.read_bytes() for p in pairs))
    known = read_public_keys(trusted)
    assert len(known) == 3
    for pair, name in zip(pairs, known, strict=True):
        sign(bundle, key=pair.private)
        assert check_signature(load_bundle(bundle), known) == name
        hint = json.loads(signature_path(bundle).read_text())["verificationMaterial"]["publicKey"]
        assert hint["hint"].startswith(name)
    other = make_pair(tmp_path, "other")
    sign(bundle, key=other.private)
    with pytest.raises(SignatureError, match="none of the trusted keys"):
        load_signed(bundle, trusted)


def forged(bundle: Path, out: Path, level: float) -> Path:
    """The bundle with other thresholds, its manifest made to fit: every hash in it holds."""
    found = load_bundle(bundle)
    scores = {
        k: v + np.asarray(level, v.dtype) for k, v in load_tensors(found.files[CONFORMAL]).items()
    }
    files = dict(found.files) | {CONFORMAL: save_tensors(scores)}
    return write_bundle(out, found.manifest, files).path


def test_a_bundle_that_was_made_anew_is_not_the_one_that_was_signed(
    bundle: Path, pair: Pair, tmp_path: Path
) -> None:
    sign(bundle, key=pair.private)
    other = forged(bundle, tmp_path / "forged", 0.1)
    shutil.copy(signature_path(bundle), signature_path(other))
    load_bundle(other)
    with pytest.raises(SignatureError, match=r"conformal\.safetensors is not what .*forged\.sig"):
        load_signed(other, pair.public)
    assert not peer(other, pair.public)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_bundle_that_was_changed_is_refused(bundle: Path, pair: Pair) -> None:
    sign(bundle, key=pair.private)
    flip(bundle / "golden.npz")
    with pytest.raises(Exception, match=r"golden\.npz was changed"):
        load_signed(bundle, pair.public)
    assert not peer(bundle, pair.public)


def test_a_bundle_without_a_signature_is_refused(bundle: Path, pair: Pair) -> None:
    assert load_signed(bundle, None).path == bundle
    with pytest.raises(SignatureError, match=r"there is no signature .*bundle\.sig"):
        load_signed(bundle, pair.public)


Edit = Callable[[dict[str, Any]], None]


def put(*path: str | int, value: Any) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        place: Any = record
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return edit


def twice(record: dict[str, Any]) -> None:
    record["dsseEnvelope"]["signatures"] *= 2


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put("mediaType", value="application/json"), "unknown kind"),
        (put("dsseEnvelope", "payloadType", value="text/plain"), "unknown kind"),
        (put("dsseEnvelope", value=[]), "not a signature"),
        (put("dsseEnvelope", "payload", value="e30="), "none of the trusted keys"),
        (put("dsseEnvelope", "payload", value="*"), "payload is not base64"),
        (put("dsseEnvelope", "payload", value=7), "payload is not base64"),
        (put("dsseEnvelope", "signatures", 0, "sig", value="AAAA"), "none of the trusted keys"),
        (put("dsseEnvelope", "signatures", 0, value=None), "sig is not base64"),
        (put("dsseEnvelope", "signatures", value=[]), "does not hold one signature"),
        (put("dsseEnvelope", "signatures", value={}), "does not hold one signature"),
        (twice, "does not hold one signature"),
    ],
)
def test_a_signature_that_was_changed_is_refused(
    bundle: Path, pair: Pair, edit: Edit, says: str
) -> None:
    path = sign(bundle, key=pair.private)
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(SignatureError, match=says):
        load_signed(bundle, pair.public)
    # Model Signing reads the first of several signatures; we take a single one.
    assert peer(bundle, pair.public) is (edit is twice)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000, "x" * (1 << 20 | 1)])
def test_what_is_no_signature_is_refused(bundle: Path, pair: Pair, text: str) -> None:
    signature_path(bundle).write_text(text)
    with pytest.raises(SignatureError, match="is not a signature of Model Signing"):
        load_signed(bundle, pair.public)


def statements(bundle: Bundle) -> dict[str, tuple[dict[str, Any], str]]:
    """Statements that a trusted key signed and that say something else, and what we say of them."""
    files = {"manifest.json": bundle.identity}
    files |= {n: hashlib.sha256(data).hexdigest() for n, data in bundle.files.items()}
    fewer = {n: d for n, d in files.items() if n != "golden.npz"}
    more = files | {"model.bin": "0" * 64}
    other = files | {"manifest.json": "0" * 64}
    made = keys.statement
    return {
        "fewer": (made(bundle, files=fewer), "does not sign 'golden.npz'"),
        "more": (made(bundle, files=more), "signs 'model.bin', which"),
        "other": (made(bundle, files=other), "manifest.json is not what"),
        "none": (made(bundle, files={}), "does not sign 'conformal.safetensors'"),
        "root": (made(bundle, root="0" * 64), "no statement of Model Signing v1.0"),
        "type": (made(bundle, _type="https://example.org"), "no statement"),
        "predicate": (made(bundle, predicateType="https://example.org"), "no statement"),
        "subjects": (made(bundle, subject=[]), "no statement"),
        "shards": (made(bundle, method="shards"), "no sha256 of whole files"),
        "empty": ({}, "no statement"),
    }


NAMES = ("fewer", "more", "other", "none", "root", "type", "predicate", "subjects", "shards")


@pytest.mark.parametrize("name", [*NAMES, "empty"])
def test_what_a_trusted_key_signed_must_be_the_files(bundle: Path, pair: Pair, name: str) -> None:
    made, says = statements(load_bundle(bundle))[name]
    keys.write_signature(signature_path(bundle), made, pair.key)
    with pytest.raises(SignatureError, match=says):
        load_signed(bundle, pair.public)
    assert not peer(bundle, pair.public)


def test_a_statement_made_by_hand_is_taken_by_both(bundle: Path, pair: Pair) -> None:
    made = keys.statement(load_bundle(bundle))
    keys.write_signature(signature_path(bundle), made, pair.key)
    load_signed(bundle, pair.public)
    assert peer(bundle, pair.public)


def test_a_file_that_is_named_twice_is_refused(bundle: Path, pair: Pair) -> None:
    found = load_bundle(bundle)
    listed = [("manifest.json", "0" * 64), *sorted({"manifest.json": found.identity}.items())]
    made = keys.statement(found, listed=listed)
    keys.write_signature(signature_path(bundle), made, pair.key)
    with pytest.raises(SignatureError, match="names a file twice"):
        load_signed(bundle, pair.public)


def test_keys_that_are_none_are_named(tmp_path: Path, pair: Pair) -> None:
    for name, data, says in [
        ("private", pair.private.read_bytes(), "holds no public key"),
        ("broken", pair.public.read_bytes().replace(b"M", b"!", 1), "a public key that is none"),
        ("rsa", keys.public_pem(rsa.generate_private_key(65537, 2048)), "P-256, P-384 or P-521"),
        ("k1", keys.public_pem(ec.generate_private_key(ec.SECP256K1())), "P-256, P-384 or P-521"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(KeyFileError, match=says):
            read_public_keys(tmp_path / name)
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_public_keys(tmp_path / "nowhere")


def test_what_cannot_be_signed(bundle: Path, pair: Pair, tmp_path: Path) -> None:
    for key, says in [
        (tmp_path / "nowhere", "cannot sign"),
        (pair.public, "cannot sign"),
        (make_pair(tmp_path, "locked", password="word").private, "cannot sign"),
    ]:
        with pytest.raises(KeyFileError, match=says):
            sign(bundle, key=key)
    with pytest.raises(SignatureError, match="would lie in the bundle"):
        sign(bundle, bundle / "bundle.sig", key=pair.private)
    with pytest.raises(SignatureError, match="cannot be written"):
        sign(bundle, tmp_path / "no" / "folder.sig", key=pair.private)
    flip(bundle / "head.onnx")
    with pytest.raises(Exception, match=r"head\.onnx was changed"):
        sign(bundle, key=pair.private)
    assert [p.name for p in tmp_path.iterdir() if "sig" in p.name] == []


@pytest.fixture
def certified(tmp_path: Path) -> Callable[..., tuple[Pair, dict[str, Path]]]:
    """Makes a key that a root certified through an authority below it, and the certificates."""

    def make(name: str = "team") -> tuple[Pair, dict[str, Path]]:
        root, middle = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        pair = make_pair(tmp_path, name)
        made = {
            "root": keys.certificate("root", root, "root", root, authority=True),
            "middle": keys.certificate("middle", middle, "root", root, authority=True),
            "leaf": keys.certificate(name, pair.key, "middle", middle, authority=False),
        }
        paths = {k: tmp_path / f"{name}-{k}.crt" for k in made}
        for k, path in paths.items():
            path.write_bytes(made[k])
        return pair, paths

    return make


def test_a_certificate_speaks_for_the_key(bundle: Path, tmp_path: Path, certified: Any) -> None:
    pair, paths = certified()
    sign(bundle, key=pair.private, certificate=paths["leaf"], chain=[paths["middle"]])
    check_certified(bundle, [paths["root"]])
    load_signed(bundle, pair.public)  # the key alone speaks for itself, too
    _, others = certified("other")
    with pytest.raises(SignatureError, match="does not hold"):
        check_certified(bundle, [others["root"]])
    with pytest.raises(KeyFileError, match="PEM"):
        check_certified(bundle, [pair.public])
    other = forged(bundle, tmp_path / "forged", 0.1)
    shutil.copy(signature_path(bundle), signature_path(other))
    with pytest.raises(SignatureError, match="does not hold"):
        check_certified(other, [paths["root"]])
    sign(bundle, key=pair.private)  # by the key alone
    with pytest.raises(SignatureError, match="does not hold"):
        check_certified(bundle, [paths["root"]])


def test_a_certificate_of_another_key_does_not_sign(bundle: Path, certified: Any) -> None:
    pair, _ = certified()
    _, others = certified("other")
    with pytest.raises(KeyFileError, match="does not match"):
        sign(bundle, key=pair.private, certificate=others["leaf"], chain=[others["middle"]])


def test_the_commands(bundle: Path, tmp_path: Path, call: Call, certified: Any) -> None:
    pair = make_pair(tmp_path, password="open sesame")
    (tmp_path / "word").write_text("open sesame\n")
    identity = load_bundle(bundle).identity
    assert_one_line(call("sign", bundle, "--key", pair.private), "cannot sign")
    done = call(
        "sign", bundle, "--key", pair.private, "--password-file", tmp_path / "word", "--json"
    )
    assert done.json == {"signature": str(tmp_path / "bundle.sig"), "identity": identity}
    held = call("verify", bundle, "--signed-by", pair.public, "--json").json
    assert held["signed"] is True and held["identity"] == identity
    assert "signed" not in call("verify", bundle, "--json").json
    assert "the signature holds" in call("verify", bundle, "--signed-by", pair.public).out
    other = make_pair(tmp_path, "other")
    assert_one_line(call("verify", bundle, "--signed-by", other.public), "none of the trusted keys")
    elsewhere = tmp_path / "kept" / "it.sig"
    elsewhere.parent.mkdir()
    signature_path(bundle).rename(elsewhere)
    assert_one_line(call("verify", bundle, "--signed-by", pair.public), "there is no signature")
    named = ("--signed-by", pair.public, "--signature", elsewhere)
    assert call("verify", bundle, *named).code == 0
    team, paths = certified()
    options = ("--key", team.private, "--certificate", paths["leaf"], "--chain", paths["middle"])
    assert call("sign", bundle, *options).code == 0
    assert call("verify", bundle, "--certified-by", paths["root"]).code == 0
    for wrong in (
        ("verify", bundle, "--signed-by", pair.public, "--certified-by", paths["root"]),
        ("verify", bundle, "--signature", elsewhere),
        ("sign", bundle, "--key", pair.private, "--chain", paths["middle"]),
        ("sign", bundle),
    ):
        assert call(*wrong).code == 2


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_without_the_extras_it_is_said_what_to_install(bundle: Path, pair: Pair) -> None:
    # None in sys.modules is how Python is told that there is no such module.
    text = python(
        "import sys\n"
        "sys.modules['cryptography'] = sys.modules['model_signing'] = None\n"
        "from pathlib import Path\n"
        "from calibration.signing import load_signed, sign\n"
        f"bundle, key = Path({str(bundle)!r}), Path({str(pair.public)!r})\n"
        "print(load_signed(bundle, None).manifest.name)\n"
        "for ask in (lambda: load_signed(bundle, key), lambda: sign(bundle, key=key)):\n"
        "    try: ask()\n"
        "    except Exception as e: print(type(e).__name__, e)\n"
    )
    assert text.splitlines() == [
        "tiny",
        "HedgedError verifying a signature needs cryptography: pip install 'hedged[verify]'",
        "HedgedError this needs model_signing: pip install 'hedged[sign]'",
    ]


def test_nothing_of_it_is_loaded_where_nobody_asks(bundle: Path) -> None:
    text = python(
        "import sys, service.app\n"
        "from calibration.signing import load_signed\n"
        f"load_signed({str(bundle)!r}, None)\n"
        "print([m for m in ('cryptography', 'model_signing', 'sigstore') if m in sys.modules])\n"
    )
    assert text.strip() == "[]"
