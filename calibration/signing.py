"""Who made a bundle: a signature beside its folder, ``BUNDLE.sig``.

The signature is an OpenSSF Model Signing v1.0 file: a Sigstore bundle around a DSSE envelope around
an in-toto statement that names the sha256 of every file. `sign` makes it with ``model-signing``,
whose own command reads it, too. A signature of a key is verified here by ``cryptography`` alone,
over the very bytes that were loaded, so that a service verifies without loading the rest.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.bundle import MANIFEST, Bundle, load_bundle, sha256
from posthoc.contract import BundleError, HedgedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
MAX_SIGNATURE = 1 << 20
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.S)


class SignatureError(BundleError):
    """A bundle that is not signed by who it must be, or was changed since. The message says why."""


class KeyFileError(HedgedError):
    """A key or certificate that cannot be used."""


def signature_path(bundle: Path) -> Path:
    """Where the signature of a bundle lies: beside it, since a bundle holds no other file."""
    bundle = bundle.absolute()  # "." has no name
    return bundle.with_name(f"{bundle.name}.sig")


def load_signed(path: str | Path, keys: Path | None, signature: Path | None = None) -> Bundle:
    """Read and verify a bundle, and its signature by one of the public ``keys`` where there are
    some (None: none is asked for). Raises as `load_bundle` and `check_signature`."""
    bundle = load_bundle(path)
    if keys is not None:
        check_signature(bundle, read_public_keys(keys), signature)
    return bundle


def check_signature(
    bundle: Bundle, keys: Mapping[str, EllipticCurvePublicKey], signature: Path | None = None
) -> str:
    """The id of the key that signed the bytes of ``bundle``, among ``keys``.

    Raises SignatureError: no signature, by none of the keys, or of other files than these.
    """
    path = signature or signature_path(bundle.path)
    envelope = _envelope(path)
    payload = _decoded(envelope, "payload", path)
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise SignatureError(f"{path} does not hold one signature")
    made = _decoded(signatures[0], "sig", path)
    signed_by = next((k for k, key in keys.items() if _is_by(key, made, payload)), None)
    if signed_by is None:
        raise SignatureError(f"{path}: none of the trusted keys ({', '.join(keys)}) made it")
    _compare(_resources(payload, path), bundle, path)
    return signed_by


def read_public_keys(path: Path) -> dict[str, EllipticCurvePublicKey]:
    """The public keys of a PEM file by id: the first 16 hex digits of the sha256 of their PEM.

    Raises KeyFileError for a file without one, and for another kind than NIST's P-256, P-384 and
    P-521, which Model Signing knows.
    """
    serialization, ec = _cryptography()
    try:
        data = path.read_bytes()
    except OSError as e:
        raise KeyFileError(f"public keys {path} cannot be read ({e.strerror})") from None
    keys: dict[str, EllipticCurvePublicKey] = {}
    for block in _PEM.findall(data):
        try:
            key = serialization.load_pem_public_key(block)
        except ValueError as e:
            raise KeyFileError(f"{path} holds a public key that is none ({e})") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _hashes():
            raise KeyFileError(f"{path} holds a key that is not of the curve P-256, P-384 or P-521")
        keys[_key_id(key)] = key
    if not keys:
        raise KeyFileError(f"{path} holds no public key (-----BEGIN PUBLIC KEY-----)")
    return keys


def sign(
    path: Path,
    out: Path | None = None,
    *,
    key: Path,
    password: str | None = None,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
) -> Path:
    """Verify a bundle and sign it with a private key; where the signature lies.

    With a ``certificate`` of the key the signature carries it and its ``chain``. A signature that
    is there is replaced. Raises BundleError for a bundle that was changed, KeyFileError for a key
    that cannot sign, HedgedError where the extra is not installed.
    """
    bundle = load_bundle(path)
    out = out or signature_path(path)
    if out.absolute().parent == path.absolute():
        raise SignatureError(f"{out} would lie in the bundle, which holds no file but its own")
    config = _model_signing("signing").Config()
    try:
        if certificate is None:
            config.use_elliptic_key_signer(
                private_key=key, password=None if password is None else password.encode()
            )
        elif password is not None:
            raise KeyFileError("a key with a certificate must not be encrypted")
        else:
            config.use_certificate_signer(
                private_key=key, signing_certificate=certificate, certificate_chain=chain
            )
    except (OSError, TypeError, ValueError) as e:  # how cryptography refuses a key
        raise KeyFileError(f"{key} cannot sign: {_said(e)}") from None
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        config.sign(path, part)
        # Between the check above and the signature somebody may have changed a file.
        _compare(_resources(_decoded(_envelope(part), "payload", part), part), bundle, part)
        part.replace(out)
    except (OSError, ValueError) as e:
        raise SignatureError(f"{out} cannot be written: {_said(e)}") from None
    finally:
        part.unlink(missing_ok=True)
    return out


def check_certified(path: Path, roots: Sequence[Path], signature: Path | None = None) -> Bundle:
    """Read and verify a bundle, and its signature by a key that one of the ``roots`` certified.

    It reads the files once more, by ``model-signing``. Raises SignatureError where the signature
    is not such a one, KeyFileError for roots that are no certificates.
    """
    bundle = load_bundle(path)
    where = signature or signature_path(path)
    _envelope(where)
    config = _model_signing("verifying").Config()
    try:
        config.use_certificate_verifier(certificate_chain=roots)
    except (OSError, ValueError) as e:
        raise KeyFileError(f"{', '.join(map(str, roots))}: {_said(e)}") from None
    try:
        config.verify(path, where)
    except Exception as e:  # each of its parts raises types of its own
        raise SignatureError(f"{where} does not hold for {path}: {_said(e)}") from None
    return bundle


def _envelope(path: Path) -> dict[str, Any]:
    """The DSSE envelope of a signature file; SignatureError where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIGNATURE + 1)
    except OSError as e:
        raise SignatureError(f"there is no signature {path} ({e.strerror})") from None
    try:
        record = json.loads(data)
        envelope = record["dsseEnvelope"]
        kinds = record["mediaType"], envelope["payloadType"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SignatureError(f"{path} is not a signature of Model Signing") from None
    if kinds != (MEDIA_TYPE, PAYLOAD_TYPE) or not isinstance(envelope, dict):
        raise SignatureError(f"{path} is of an unknown kind: {kinds[0]!r} of {kinds[1]!r}")
    return envelope


def _decoded(record: Any, name: str, path: Path) -> bytes:
    try:
        return base64.b64decode(record[name], validate=True)
    except (KeyError, TypeError, binascii.Error, ValueError):
        raise SignatureError(f"{path}: its {name} is not base64") from None


def _is_by(key: EllipticCurvePublicKey, signature: bytes, payload: bytes) -> bool:
    """Whether ``key`` made the signature of the payload, by DSSE v1's encoding of both."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    kind = PAYLOAD_TYPE.encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    try:
        key.verify(signature, signed, ECDSA(_hashes()[key.curve.name]))
    except InvalidSignature:
        return False
    return True


def _resources(payload: bytes, path: Path) -> dict[str, str]:
    """Name → sha256 of every file that a signed statement names."""
    try:
        statement = json.loads(payload)
        predicate = statement["predicate"]
        kinds = statement["_type"], statement["predicateType"]
        how = predicate["serialization"]["method"], predicate["serialization"]["hash_type"]
        (subject,) = statement["subject"]
        listed = [(r["name"], r["algorithm"], r["digest"]) for r in predicate["resources"]]
        whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, _, digest in listed))
        root = subject["digest"]["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SignatureError(f"{path}: what was signed is no statement of Model Signing") from None
    if kinds != (STATEMENT, PREDICATE) or root != whole.hexdigest():
        raise SignatureError(f"{path}: what was signed is no statement of Model Signing v1.0")
    if how != ("files", "sha256") or any(kind != "sha256" for _, kind, _ in listed):
        raise SignatureError(f"{path}: it signs no sha256 of whole files; sign with hedged sign")
    names = {name: digest for name, _, digest in listed}
    if len(names) != len(listed):
        raise SignatureError(f"{path}: it names a file twice")
    return names


def _compare(signed: Mapping[str, str], bundle: Bundle, path: Path) -> None:
    """SignatureError where the files that were signed are not those of the bundle."""
    files = {MANIFEST: bundle.identity} | {n: sha256(data) for n, data in bundle.files.items()}
    for name in sorted(signed.keys() | files.keys()):
        if name not in files:
            raise SignatureError(f"{path}: it signs {name!r}, which {bundle.path} does not hold")
        if name not in signed:
            raise SignatureError(f"{path}: it does not sign {name!r} of {bundle.path}")
        if signed[name] != files[name]:
            raise SignatureError(f"{bundle.path}: {name} is not what {path} signs")


def _key_id(key: EllipticCurvePublicKey) -> str:
    serialization, _ = _cryptography()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()[:16]  # of what Model Signing calls the key's hint


def _hashes() -> dict[str, Any]:
    """Curve → the hash that Model Signing uses with it."""
    from cryptography.hazmat.primitives import hashes

    return {
        "secp256r1": hashes.SHA256(),
        "secp384r1": hashes.SHA384(),
        "secp521r1": hashes.SHA512(),
    }


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ModuleNotFoundError:
        raise HedgedError(
            "verifying a signature needs cryptography: pip install 'hedged[verify]'"
        ) from None
    return serialization, ec


def _model_signing(page: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{page}")
    except ModuleNotFoundError as e:
        missing = (e.name or page).partition(".")[0]
        raise HedgedError(f"this needs {missing}: pip install 'hedged[sign]'") from None


def _said(error: Exception) -> str:
    """An error in one line, by its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
