"""``hedged monitor``: a ledger watched for drift, as Prometheus metrics."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from hedged.commands.ages import seconds
from hedged.commands.console import err, option

_MORE = """LEDGER is the SQLite file or the postgresql:// URL of a service, which goes on writing
meanwhile. Of each model and version the first --reference predictions say what is normal; what
comes after them is held against these, by streams of confidence, entropy, set size, p-value or
std, and of errors once labels are there. A conformal test martingale gathers evidence that a
stream is not like its reference any more (a healthy one passes 10^L, ever, with probability at
most 10^-L), a change-point detector says when it changed, KS and PSI say by how much. Evidence is
kept in --state, which one monitor has at a time, and goes on after a restart. Prometheus scrapes
http://HOST:PORT/metrics. Ends on SIGTERM and SIGINT, with exit code 0.

With --bundles, a bundle or the root that is served, labels are held against what each bundle
promised: coverage of each level, and accuracy, against the lower bound by its own rows less a
tolerance of 0.02. An alarm is false with probability at most 0.05, however long it is watched, and
that is so for each level and for accuracy by itself: for two levels and accuracy at most 0.15 in
all. They begin with the labels of the first look with --bundles, coverage with those that --state
has counted, and go on without --bundles.

Expected accuracy, the mean confidence of what is served, stands beside its bias on the labelled
rows of --window.

\b
Examples:
  hedged monitor hedged-ledger.sqlite
  hedged monitor postgresql://localhost/hedged --port 9100 --window 6h
  hedged monitor hedged-ledger.sqlite --bundles models --port 9100
  hedged monitor hedged-ledger.sqlite --once --json
"""


def monitor(
    ledger: Annotated[str, typer.Argument(help="SQLite file, or postgresql:// URL")],
    host: Annotated[str, option(help="Address to publish on")] = "127.0.0.1",
    port: Annotated[int, option(help="Port to publish on", min=0, max=65535)] = 9464,
    every: Annotated[float, option(help="Seconds between two looks", min=0.1)] = 10.0,
    bundles: Annotated[
        Path | None, option(help="A bundle, or the root of them, whose promises are watched")
    ] = None,
    lag: Annotated[
        float, option(help="Seconds for which rows wait for others that may come before", min=0)
    ] = 5.0,
    window: Annotated[
        str, option(help="Age of the predictions whose ECE is published, such as 1d or 6h")
    ] = "1d",
    reference: Annotated[
        int, option(help="Values of each stream that say what is normal", min=500)
    ] = 2000,
    latest: Annotated[
        int, option(help="Latest values of each stream whose distance is published", min=50)
    ] = 1000,
    detector: Annotated[
        str | None, option(help="Of change points: cusum, dsm or bocd; default cusum")
    ] = None,
    state: Annotated[Path, option(help="File in which evidence outlives the process")] = Path(
        "hedged-monitor.json"
    ),
    once: Annotated[bool, option("--once", help="Read what is there, say what was found")] = False,
    json: Annotated[bool, option("--json", help="Of --once: print JSON")] = False,
) -> None:
    """Watch a ledger for drift, and publish what is found as metrics."""
    from calibration.drift.detector import DEFAULT
    from hedged.commands.monitor_tables import show
    from service.monitor.run import monitoring
    from service.monitor.stream import Options
    from service.scoring.places import shown_url

    if json and not once:
        raise typer.BadParameter("--json needs --once")
    options = Options(reference=reference, window=latest, detector=detector or DEFAULT)
    window_s = seconds(window, "--window")
    with monitoring(ledger, options, state, window_s=window_s, lag_s=lag, bundles=bundles) as found:
        if once:
            found.catch_up()
            show(found.told(), json)
            return
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with found.publishing(host, port) as address:
            where = f"metrics of {shown_url(ledger)} at http://{address}/metrics"
            err.print(where, markup=False, soft_wrap=True)
            found.run(stop, every)


monitor.__doc__ = f"{monitor.__doc__}\n\n{_MORE}"
