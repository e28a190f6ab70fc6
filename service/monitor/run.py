"""The monitor as a process: looks again and again, keeps what it found, and publishes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import start_http_server

from posthoc.contract import HedgedError
from service.monitor.fields import Key
from service.monitor.promises import Promises
from service.monitor.publish import Publisher, registry
from service.monitor.saved import held, restore, save
from service.monitor.shelf import Shelf
from service.monitor.stream import Options
from service.monitor.told import told
from service.monitor.watch import Watch, look
from service.monitor.window import windowed
from service.upkeep import BusyLedgerError, file_of, opened

_REST = 9.0  # reading every label of the window takes a tenth of the time at most
_log = logging.getLogger("hedged.monitor")


@contextmanager
def monitoring(
    ledger: str,
    options: Options,
    state: Path,
    *,
    window_s: float,
    lag_s: float,
    bundles: Path | None = None,
) -> Iterator[Monitor]:
    """The monitor of a ledger, which alone has the file ``state`` while inside.

    ``window_s``: seconds of predictions whose calibration is published; ``lag_s``: of rows that are
    left for later; ``bundles``: a bundle, or a root of them, whose promises are watched. Raises at
    once LedgerError where there is no ledger, DataError for a file that another monitor has, or
    that is not of such a watch, and BundleError for a folder without a bundle.
    """
    file_of(ledger)  # said before a lock is made, or a port is open
    with held(state):
        yield Monitor(
            ledger,
            options,
            state,
            window_s=window_s,
            lag_s=lag_s,
            shelf=None if bundles is None else Shelf(bundles),
        )


class Monitor:
    """One ledger that is watched, and the file that its evidence is kept in; see `monitoring`."""

    def __init__(
        self,
        ledger: str,
        options: Options,
        state: Path,
        *,
        window_s: float,
        lag_s: float,
        shelf: Shelf | None,
    ) -> None:
        self._ledger = ledger
        self._options = options
        self._state = state
        self._window_s = window_s
        self._lag_s = lag_s
        self._shelf = shelf
        self._publisher = Publisher()
        self._figures: list[dict[str, Any]] = []
        self._due = 0.0  # when the figures of the window are computed again
        self.watch: Watch = restore(state, options)

    def catch_up(self, stop: threading.Event | None = None) -> int:
        """Read everything that is new, page by page; the number of rows. What was read is kept
        after each page. Raises LedgerError where the ledger cannot be read."""
        total = 0
        with opened(self._ledger) as ledger:
            while stop is None or not stop.is_set():
                # Sources first: of a bundle that comes in between the next look knows.
                shelf = self._shelf
                promised = (
                    {} if shelf is None else shelf.promises(ledger.sources(), self.watch.coverage)
                )
                with ledger.reading() as conn:
                    until = time.time() - self._lag_s
                    found, read = look(conn, self.watch, self._options, until, promised)
                new = [k for k, p in found.promises.items() if not self._watches(k, p)]
                if not read and not new:
                    break
                self._tell(new)
                save(found, self._options, self._state)
                self.watch, total = found, total + read
        return total

    def _watches(self, key: Key, promises: Promises) -> bool:
        known = self.watch.promises.get(key)
        return known is not None and known.identity == promises.identity

    def _tell(self, new: Iterable[Key]) -> None:
        """Say of promises that begin after labels were read which of those count."""
        for model, version in new:
            seen = self.watch.coverage.get((model, version), {})
            if n := sum(one.n for one in seen.values()):
                _log.warning(
                    "%s %s: its bundle is known from here on; of the %d labels that were read "
                    "before coverage counts all where no other bundle had this version, and "
                    "accuracy none",
                    *(model, version, n),
                )

    def told(self) -> dict[str, Any]:
        """Everything that was found, as plain JSON values; see `service.monitor.told`."""
        self.measure()
        return told(self.watch, self._options, self._figures)

    def measure(self) -> None:
        """Compute the figures of the window anew."""
        with opened(self._ledger) as ledger, ledger.reading() as conn:
            self._figures = windowed(conn, self._window_s)

    def publish(self) -> None:
        """Move the metrics to what is known now; figures of the window may be a while old."""
        if (begun := time.monotonic()) >= self._due:
            self.measure()
            now = time.monotonic()
            self._due = now + _REST * (now - begun)
        self._publisher.publish(self.watch, self._options, self._figures)

    def run(self, stop: threading.Event, every: float) -> None:
        """Look every so many seconds until ``stop`` is set. A ledger that is away is tried again;
        one that is no ledger is an error at the first look."""
        first = True
        while not stop.is_set():
            try:
                self.catch_up(stop)
                self.publish()
            except BusyLedgerError as e:
                _log.warning("%s", e)
            except HedgedError:
                if first:
                    raise
                _log.exception("the ledger could not be read; the next look tries again")
            first = False
            stop.wait(every)

    @contextmanager
    def publishing(self, host: str, port: int) -> Iterator[str]:
        """Answer Prometheus at the address that is yielded, while inside."""
        try:
            server, thread = start_http_server(port, host, registry())
        except OSError as e:
            raise HedgedError(
                f"{host}:{port} cannot be listened on ({e}); give another --port"
            ) from e
        try:
            yield f"{host}:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
