"""Keys, certificates, and signatures of any statement, made by `cryptography` alone."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from calibration import signing
from calibration.bundle import Bundle

CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
HASHES = {"P-256": hashes.SHA256(), "P-384": hashes.SHA384(), "P-521": hashes.SHA512()}


@dataclass(frozen=True)
class Pair:
    """A key in files: the private one and the public one, PEM."""

    private: Path
    public: Path
    key: ec.EllipticCurvePrivateKey


def pem_of(key: ec.EllipticCurvePrivateKey, password: str | None = None) -> bytes:
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        how = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def public_pem(key: Any) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def make_pair(
    folder: Path, name: str = "key", curve: str = "P-256", password: str | None = None
) -> Pair:
    key = ec.generate_private_key(CURVES[curve])
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(pem_of(key, password))
    public.write_bytes(public_pem(key))
    return Pair(private, public, key)


def statement(bundle: Bundle, **changes: Any) -> dict[str, Any]:
    """What Model Signing signs of a bundle. ``files``: name → sha256 in place of its own;
    ``root`` in place of the digest over them; others are fields of the statement."""
    files = {"manifest.json": bundle.identity}
    files |= {n: hashlib.sha256(data).hexdigest() for n, data in bundle.files.items()}
    files = changes.pop("files", files)
    listed = changes.pop("listed", sorted(files.items()))
    root = hashlib.sha256(b"".join(bytes.fromhex(d) for _, d in listed)).hexdigest()
    made = {
        "_type": signing.STATEMENT,
        "subject": [{"name": "any", "digest": {"sha256": changes.pop("root", root)}}],
        "predicateType": signing.PREDICATE,
        "predicate": {
            "serialization": {
                "method": changes.pop("method", "files"),
                "hash_type": "sha256",
                "allow_symlinks": False,
            },
            "resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in listed],
        },
    }
    return made | changes


def signed(payload: bytes, key: ec.EllipticCurvePrivateKey, **changes: Any) -> dict[str, Any]:
    """A signature file around a payload. ``kind``: the type that the envelope says, and that is
    signed; ``media``: of the whole."""
    kind = changes.get("kind", signing.PAYLOAD_TYPE)
    encoded = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    algorithm = next(h for c, h in HASHES.items() if CURVES[c].name == key.curve.name)
    made = base64.b64encode(key.sign(encoded, ec.ECDSA(algorithm))).decode()
    hint = hashlib.sha256(public_pem(key)).hexdigest()
    return {
        "mediaType": changes.get("media", signing.MEDIA_TYPE),
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"sig": made, "keyid": ""}],
        },
    }


def write_signature(path: Path, made: dict[str, Any], key: ec.EllipticCurvePrivateKey) -> Path:
    path.write_text(json.dumps(signed(json.dumps(made).encode(), key)))
    return path


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    authority: bool,
    host: str | None = None,
) -> bytes:
    """A certificate, PEM: of an authority, or of a key that may sign, of a server named host."""
    named = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, issuer)]
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(named[0])
        .issuer_name(named[1])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36_500))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if host is not None:
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        made = made.add_extension(names, critical=False)
    return made.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
