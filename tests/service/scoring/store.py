"""An object store in a process of its own, and a proxy before it that fails and dawdles as told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import urlopen

from tests.ports import held_port

# What is to become of a request (its number from 1, its method and its target): an HTTP status to
# answer with, seconds to wait before it is passed on, or None.
Fault = Callable[[int, str, str], int | float | None]


def no_fault(number: int, method: str, target: str) -> None:
    """Every request is passed on."""


class Proxy:
    """Passes HTTP requests on to a port of this machine, one a connection; ``seen`` are those that
    came since `rule`."""

    def __init__(self, behind: int):
        self._behind = behind
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._fault: Fault = no_fault
        self.port = 0
        self.seen: list[tuple[str, str]] = []

    def rule(self, fault: Fault = no_fault) -> None:
        """From now on requests count from 1, and this becomes of them."""
        self._fault, self.seen = fault, []

    def start(self) -> None:
        """Listen on a free port."""
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        """Listen no more."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stopped.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *fields = head.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ")
            lower = {f.partition(":")[0].lower(): f.partition(":")[2].strip() for f in fields}
            if lower.get("expect") == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if lower.get("transfer-encoding") == "chunked":
                body = await _chunks(reader)
            else:
                body = await reader.readexactly(int(lower.get("content-length", 0)))
            self.seen.append((method, target))
            told = self._fault(len(self.seen), method, target)
            if isinstance(told, int):
                writer.write(
                    f"HTTP/1.1 {told} no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )
            else:
                await asyncio.sleep(told or 0)
                writer.write(await self._ask(first, fields, body))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left
        finally:
            writer.close()

    async def _ask(self, first: str, fields: list[str], body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._behind)
        kept = [f for f in fields if not f.lower().startswith(("connection:", "expect:"))]
        lines = [first, "Connection: close", *(f for f in kept if f)]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        answer = await reader.read()
        writer.close()
        return answer.replace(b"Connection: keep-alive", b"Connection: close")


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """A body in chunks, as it stands."""
    parts = []
    size = -1
    while size:
        parts.append(await reader.readuntil(b"\r\n"))
        size = int(parts[-1].partition(b";")[0], 16)
        parts.append(await reader.readexactly(size))
        end = await reader.readuntil(b"\r\n")
        while not size and end[-4:] not in (b"\r\n", b"\r\n\r\n"):
            end += await reader.readuntil(b"\r\n")  # fields behind the last chunk
        parts.append(end)
    return b"".join(parts)


@contextmanager
def running_store() -> Iterator[Proxy]:
    """moto's server behind a proxy."""
    with held_port() as port:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        proxy = Proxy(port)
        try:
            _wait_for(port, server)
            proxy.start()
            try:
                yield proxy
            finally:
                proxy.stop()
        finally:
            server.kill()
            server.wait(30)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=10):
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.1)
