"""The prediction path with the ledger and without it, in one process and in turn.

``PROMETHEUS_MULTIPROC_DIR`` must be set before this starts, as it is in a worker of a server.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import uvloop

from bench.asgi import running, timed
from bench.worker import serve


class _Silent:
    """A ledger that keeps nothing."""

    def record(self, *_: Any, **__: Any) -> bool:
        """As `service.ledger.Ledger.record`."""
        return True


def ratio(bundle: str, folder: str, path: str, body: str, rounds: int, calls: int) -> Any:
    """Seconds of a call, the median of each of ``rounds`` blocks of ``calls``: on and off."""
    return uvloop.run(_ratio(Path(bundle), Path(folder), path, body.encode(), rounds, calls))


async def _ratio(
    bundle: Path, folder: Path, path: str, body: bytes, rounds: int, calls: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"on": [], "off": []}
    async with running(bundle, folder / "on") as on, running(bundle, folder / "off") as off:
        apps = {"on": on, "off": off}
        assert on.core is not None and off.core is not None
        off.core.ledger = _Silent()  # type: ignore[assignment]
        for turn in range(rounds + 1):
            # Who comes first changes, so that neither always follows the other's work.
            for name in sorted(apps, reverse=bool(turn % 2)):
                times = [await timed(apps[name], path, body) for _ in range(calls)]
                on.core.later.flush()
                assert on.core.ledger.flush(60)
                if turn:  # the first warms up
                    found[name].append(statistics.median(times))
        served = sum(m["served"] for m in on.core.ledger.calibration()["models"])
        assert served == (rounds + 1) * calls, served
    return found


if __name__ == "__main__":
    serve({"ratio": ratio})
