"""Programs that a test starts, waits for and ends."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil

from tests.service.helpers import poll


def get(url: str, key: str | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST of JSON; status 0 where nobody answers."""
    headers = {"Content-Type": "application/json"} if body else {}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with urlopen(Request(url, data=body, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except HTTPError as e:
        with e:
            return e.code, e.read()
    except OSError:
        return 0, b""


class Program:
    """A process with its log; use as a context manager, at whose end it is gone."""

    def __init__(
        self, argv: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = psutil.Popen(
                [str(word) for word in argv],
                env=environment,
                cwd=log.parent,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_running():
            self.process.terminate()
        try:
            self.process.wait(30)
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)

    def port(self) -> int:
        """The only port of this machine that the process itself listens on."""

        def listening() -> list[int]:
            assert self.process.poll() is None, self.log.read_text()
            found: list[Any] = self.process.net_connections("tcp4")
            return [c.laddr.port for c in found if c.status == psutil.CONN_LISTEN]

        (port,) = poll(listening, lambda ports: len(ports) == 1)
        return int(port)

    def answers(self, url: str) -> None:
        """Wait until a GET of the URL is a 200."""

        def status() -> int:
            assert self.process.poll() is None, self.log.read_text()
            return get(url)[0]

        poll(status, lambda found: found == 200)
