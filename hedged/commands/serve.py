"""``hedged serve``: a bundle behind an address, by BentoML."""

from __future__ import annotations

import math
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedged.commands.console import err

if TYPE_CHECKING:
    from service.settings import Settings

_MORE = """Each flag is also a variable, and so are the settings that have no flag (HEDGED_MAX_ROWS,
…): docs/reference/settings.md. `bentoml serve service.bento:svc` reads the same variables.

\b
Examples:
  hedged serve bundle
  hedged serve models/ --port 8080 --workers 2 \\
      --ledger postgresql://localhost/hedged
"""


def setting(name: str, help: str) -> Any:
    """An option that is a setting of the service, by the setting's own variable."""
    return typer.Option(help=help, envvar=name, allow_from_autoenv=False)


def serve(
    bundles: Annotated[
        Path,
        typer.Argument(
            help="A bundle, or ROOT of ROOT/<name>/<version>/",
            envvar="HEDGED_BUNDLES",
            show_envvar=True,
        ),
    ],
    host: Annotated[
        str | None, setting("HEDGED_HOST", "Address to listen on; default 127.0.0.1")
    ] = None,
    port: Annotated[int | None, setting("HEDGED_PORT", "Port; default 3000")] = None,
    workers: Annotated[int | None, setting("HEDGED_WORKERS", "Server processes; default 1")] = None,
    device: Annotated[
        str | None, setting("HEDGED_DEVICE", "auto, cpu, cuda[:n] or tensorrt; default cpu")
    ] = None,
    threads: Annotated[
        int | None, setting("HEDGED_THREADS", "Threads of each model; default its share of cores")
    ] = None,
    ledger: Annotated[
        str | None, setting("HEDGED_LEDGER", "SQLAlchemy URL or SQLite file; default in data-dir")
    ] = None,
    data_dir: Annotated[
        Path | None, setting("HEDGED_DATA_DIR", "Folder of what the server writes; default here")
    ] = None,
) -> None:
    """Serve bundles over HTTP, with labels, metrics and a live page."""
    from hedged.supervisor import supervise
    from posthoc.contract import HedgedError
    from service.lock import locked
    from service.settings import load_settings

    given = {
        "BUNDLES": bundles.resolve(),
        "HOST": host,
        "PORT": port,
        "WORKERS": workers,
        "DEVICE": device,
        "THREADS": threads,
        "LEDGER": ledger,
        "DATA_DIR": data_dir,
    }
    os.environ.update({f"HEDGED_{k}": str(v) for k, v in given.items() if v is not None})
    settings = load_settings()
    address = free_address(settings.host, settings.port)
    for line in describe(settings):
        err.print(line, soft_wrap=True, markup=False)
    # BentoML keeps its metric files under its home and empties them at every start, so two
    # servers must not share one.
    own = settings.data_dir.resolve() / ".bentoml"
    home = Path(os.environ.setdefault("BENTOML_HOME", str(own)))
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    command = [
        sys.executable, "-m", "bentoml", "serve", "service.bento:svc",
        "--host", address, "--port", str(settings.port),
        # What has begun is answered, however long its own limit lets it take.
        "--timeout-graceful-shutdown", str(math.ceil(max(30, settings.request_timeout_s))),
    ]  # fmt: skip
    alone = HedgedError(
        f"another server keeps its metrics in {home}: stop it, or give this one a folder of its "
        f"own with --data-dir{' (and --ledger for the same ledger)' * (home == own)}"
    )
    with locked(home / "hedged.lock", alone, make=True):
        code = supervise(
            command,
            drain_s=settings.drain_s,
            workers=settings.workers,
            say=lambda line: err.print(f"hedged: {line}", soft_wrap=True, markup=False),
        )
    raise typer.Exit(code)


def free_address(host: str, port: int) -> str:
    """The IP address of ``host``, where nobody listens on ``port`` yet. Raises HedgedError."""
    from posthoc.contract import HedgedError

    try:
        family, kind, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own does
            s.bind(name)
    except OSError as e:  # no such name, too
        raise HedgedError(
            f"cannot listen on {host}:{port} ({e.strerror}); see --host, --port"
        ) from e
    return str(name[0])


def describe(settings: Settings) -> list[str]:
    """What is to be served and how, a line each.

    Raises BundleError, ModelError and LedgerError as the workers would, where none of the bundles,
    or not the device or the ledger, can be what the settings say.
    """
    from calibration.bundle import MANIFEST, parse_manifest
    from posthoc.contract import BundleError
    from posthoc.runtime import planned_provider
    from service.bundles import find_bundles, none_of
    from service.schema import ledger_url

    path = settings.bundle_path
    models, problems = dict[str, str](), dict[str, Exception]()
    for name, folder in find_bundles(path).items():
        try:
            models[name] = parse_manifest((folder / MANIFEST).read_bytes(), folder).version
        except BundleError as e:  # the workers say it, too, and start without it
            problems[name] = e
    if not models:
        raise none_of(path, problems)
    if settings.keys is not None:
        access = f"API keys of {settings.keys}"
    else:
        access = "no keys: " + ("anybody" if settings.open else "this machine only")
    url = ledger_url(settings.ledger_url)
    # As a user writes it, without the driver; str(url) has the password in SQLAlchemy 2.0.
    ledger = url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)
    signed = [] if settings.signed_by is None else [f"signed   by keys of {settings.signed_by}"]
    return [
        f"address  http://{settings.host}:{settings.port}",
        f"models   {', '.join(f'{name} {version}' for name, version in models.items())} in {path}",
        f"device   {settings.device}, {planned_provider(settings.device)}; "
        f"workers: {settings.workers}, threads of each: {settings.model_threads or 'one per core'}",
        f"ledger   {ledger}",
        f"access   {access}",
        *signed,
    ]


serve.__doc__ = f"{serve.__doc__}\n\n{_MORE}"
