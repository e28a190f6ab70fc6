"""``hedged sign``: a signature beside a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hedged.commands import console
from hedged.commands.console import option

_MORE = """The signature is a file of OpenSSF Model Signing (pip install 'hedged[sign]'); the bundle
stays as it is. `hedged verify BUNDLE --signed-by key.pub` checks it, and a server that was started
with HEDGED_SIGNED_BY=key.pub serves no bundle without it. Keys are of the curve P-256, P-384 or
P-521:

\b
  openssl ecparam -name prime256v1 -genkey -noout -out key.pem
  openssl ec -in key.pem -pubout -out key.pub

\b
Examples:
  hedged sign bundle --key key.pem
  hedged sign bundle --key key.pem --certificate team.pem --chain company.pem
"""


def sign(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder")],
    key: Annotated[Path, option("--key", help="Private key, PEM")],
    password_file: Annotated[
        Path | None, option(help="File with the password of the key, where it has one")
    ] = None,
    certificate: Annotated[
        Path | None, option(help="Certificate of the key, PEM: it goes into the signature")
    ] = None,
    chain: Annotated[
        list[Path] | None, option(help="Certificate that certified it, PEM; repeatable, upwards")
    ] = None,
    out: Annotated[
        Path | None, option("--out", "-o", help="Where to write it; default BUNDLE.sig")
    ] = None,
    json: Annotated[bool, option("--json", help="Print what was done as JSON")] = False,
) -> None:
    """Verify a bundle and sign it with a private key."""
    from calibration.bundle import MANIFEST, sha256
    from calibration.signing import KeyFileError
    from calibration.signing import sign as sign_bundle

    if chain and certificate is None:
        raise typer.BadParameter("--chain is of a --certificate")
    password = None
    if password_file is not None:
        try:
            password = password_file.read_text("utf-8").rstrip("\r\n")
        except OSError as e:
            raise KeyFileError(f"{password_file} cannot be read ({e.strerror})") from None
    written = sign_bundle(
        bundle, out, key=key, password=password, certificate=certificate, chain=chain or ()
    )
    identity = sha256((bundle / MANIFEST).read_bytes())
    if json:
        console.print_json({"signature": str(written), "identity": identity})
    else:
        console.out.print(escape(f"{written} signs {bundle}, identity {identity}"))


sign.__doc__ = f"{sign.__doc__}\n\n{_MORE}"
