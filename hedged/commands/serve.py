"""``hedged serve``: a bundle behind an address, by BentoML."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """Examples:

  hedged serve bundle

  hedged serve models/ --port 8080 --workers 2 --ledger postgresql+psycopg://localhost/hedged

Every flag is also a variable (HEDGED_PORT=8080); `bentoml serve service.bento:svc` reads the same.
"""


def serve(
    bundles: Annotated[Path, typer.Argument(help="Bundle, or ROOT/<name>/<version>/")],
    host: Annotated[str | None, typer.Option(help="Address; default 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default 3000")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default 1")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda[:n] or tensorrt")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the model on the CPU")] = None,
    ledger: Annotated[str | None, typer.Option(help="SQLAlchemy URL or SQLite file")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of what the server writes")] = None,
) -> None:
    """Serve bundles over HTTP: predictions, labels, calibration, metrics and a live page."""
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


serve.__doc__ = (serve.__doc__ or "") + "\n\n" + _EXAMPLES
