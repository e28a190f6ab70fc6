"""``hedged serve``: a bundle behind an address, by BentoML."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_MORE = """Each flag is also a variable, and so are the settings that have no flag (HEDGED_MAX_ROWS,
…): see the README. `bentoml serve service.bento:svc` reads the same variables.

\b
Examples:
  hedged serve bundle
  hedged serve models/ --port 8080 --workers 2 \\
      --ledger postgresql+psycopg://localhost/hedged
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
        int | None, setting("HEDGED_THREADS", "Threads of the model; default one per core")
    ] = None,
    ledger: Annotated[
        str | None, setting("HEDGED_LEDGER", "SQLAlchemy URL or SQLite file; default in data-dir")
    ] = None,
    data_dir: Annotated[
        Path | None, setting("HEDGED_DATA_DIR", "Folder of what the server writes; default here")
    ] = None,
) -> None:
    """Serve bundles over HTTP, with labels, metrics and a live page."""
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
    # BentoML keeps its metric files under its home and empties them at every start, so two
    # servers must not share one.
    home = settings.data_dir.resolve() / ".bentoml"
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("BENTOML_HOME", str(home))
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    command = [
        sys.executable, "-m", "bentoml", "serve", "service.bento:svc",
        "--host", settings.host, "--port", str(settings.port),
        "--timeout-graceful-shutdown", "30",
    ]  # fmt: skip
    # In place of this process, so that signals reach the server itself.
    os.execv(sys.executable, command)


serve.__doc__ = f"{serve.__doc__}\n\n{_MORE}"
