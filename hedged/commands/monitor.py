"""``hedged monitor``: a ledger watched for drift, as Prometheus metrics."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hedged.commands import console
from hedged.commands.ages import seconds
from hedged.commands.console import err, option

if TYPE_CHECKING:
    from service.monitor.watch import Watch

_MORE = """LEDGER is the SQLite file or the postgresql:// URL of a service, which goes on writing
meanwhile. Of each model and version the first --reference predictions say what is normal; what
comes after them is held against these, by streams of confidence, entropy, set size, p-value or
std, and of errors once labels are there. A conformal test martingale gathers evidence that a
stream is not like its reference any more (a healthy one passes 10^L, ever, with probability at
most 10^-L), a change-point detector says when it changed, KS and PSI say by how much. Evidence is
kept in --state and goes on after a restart. Prometheus scrapes http://HOST:PORT/metrics. Ends on
SIGTERM and SIGINT, with exit code 0.

\b
Examples:
  hedged monitor hedged-ledger.sqlite
  hedged monitor postgresql+psycopg://localhost/hedged --port 9100 --window 6h
  hedged monitor hedged-ledger.sqlite --once --json
"""


def monitor(
    ledger: Annotated[str, typer.Argument(help="SQLite file, or postgresql:// URL")],
    host: Annotated[str, option(help="Address to publish on")] = "127.0.0.1",
    port: Annotated[int, option(help="Port to publish on", min=0, max=65535)] = 9464,
    every: Annotated[float, option(help="Seconds between two looks", min=0.1)] = 10.0,
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
    from service.monitor.run import Monitor
    from service.monitor.stream import Options

    if json and not once:
        raise typer.BadParameter("--json needs --once")
    options = Options(reference=reference, window=latest, detector=detector or DEFAULT)
    window_s = seconds(window, "--window")
    found = Monitor(ledger, options, state, window_s=window_s, lag_s=lag)
    if once:
        found.catch_up()
        _show(found.watch, json)
        return
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with found.publishing(host, port) as address:
        err.print(f"metrics of {ledger} at http://{address}/metrics", markup=False, soft_wrap=True)
        found.run(stop, every)


monitor.__doc__ = f"{monitor.__doc__}\n\n{_MORE}"


def _show(watch: Watch, as_json: bool) -> None:
    rows = [
        {"model": model, "version": version, "stream": name, **_described(stream)}
        for (model, version), streams in watch.streams.items()
        for name, stream in streams.items()
    ]
    if as_json:
        console.print_json({"streams": rows})
        return
    table = Table(*("model", "version", "stream", "values", "evidence 10^", "changes", "KS", "PSI"))
    for row in rows:
        cells = (row["log10_martingale"], row["ks"], row["psi"])
        bet, *distances = ("—" if c is None else f"{c:.3g}" for c in cells)
        seen = f"{row['seen']:,}" if not row["learning"] else f"learns: {row['reference']:,}"
        shown = [row["model"], row["version"], row["stream"], seen]
        table.add_row(*map(escape, shown), bet, str(row["changes"]), *distances)
    console.out.print(table)


def _described(stream: Any) -> dict[str, Any]:
    distances = stream.distances()
    bet = stream.martingale
    return {
        "reference": len(stream.gathered) if stream.learning else sum(stream.reference),
        "learning": stream.learning,
        "seen": 0 if bet is None else bet.seen,
        "log10_martingale": None if bet is None else bet.log10_capital,
        "changes": stream.changes,
        "ks": distances.get("ks"),
        "psi": distances.get("psi"),
    }
