"""``hedged serve`` while it runs: it starts BentoML's process and ends it without losing a request.

BentoML closes its port as soon as it is told to stop, and its ``/readyz`` never says so before.
So the signal comes here: the workers are told to drain (service.drain), and only then BentoML.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from posthoc.contract import HedgedError
from service.drain import FAILED, LIFELINE, READY, STARTING, UNSERVED, handed_down

_FIRST = asyncio.FIRST_COMPLETED
_ORPHANS_S = 40.0  # for workers whose parent was killed: longer than the last request may take


@dataclass
class _Start:
    """How the start of the workers went."""

    workers: int
    say: Callable[[str], None]
    count: int = 0
    failure: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    said: set[str] = field(default_factory=set)

    def take(self, report: str) -> None:
        """One line of a worker. What fails after one was ready BentoML starts again."""
        what, _, text = report.strip().partition(" ")
        self.count += what == STARTING
        if what == UNSERVED and text not in self.said:  # every worker reports it
            self.said.add(text)
            self.say(f"not served: {text}")
        if what == READY:
            self.ready.set()
        elif not self.ready.is_set() and not self.failure:
            if what == FAILED:
                self.failure = text
            elif self.count > 2 * self.workers:
                self.failure = "its processes end while they load; is there memory enough?"
            if self.failure:
                self.failed.set()


def supervise(
    command: Sequence[str], *, drain_s: float, workers: int, say: Callable[[str], None]
) -> int:
    """Run ``command``, a BentoML server, until it ends or SIGTERM or SIGINT comes; its exit code.

    At the signal its ``workers`` drain for ``drain_s`` seconds, then it is ended, and the code is
    0; a second signal skips the wait. ``say`` gets a line at each step. Raises HedgedError when the
    workers cannot start, with their reason.
    """
    return asyncio.run(_supervise(command, drain_s, _Start(workers, say), say))


async def _supervise(
    command: Sequence[str], drain_s: float, start: _Start, say: Callable[[str], None]
) -> int:
    asked, hurried = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (hurried if asked.is_set() else asked).set()
        )
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=os.environ | {LIFELINE: handed_down(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches a whole group: it must come here only
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    heard = asyncio.create_task(_listen(reader, start))
    ended = asyncio.create_task(process.wait())
    await _any(ended, asked, start.ready, start.failed)
    if start.ready.is_set() and not ended.done() and not asked.is_set():
        say("ready")
        await _any(ended, asked)
    if not ended.done():
        if start.ready.is_set() and drain_s:
            say(f"stopping: not ready, answers for another {drain_s:g} s (again to skip that)")
            writer.write_eof()
            await _any(ended, hurried, timeout=drain_s)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    code = await ended
    # The end of file says that no worker is left. Where BentoML's process was killed they end
    # by themselves, once the lifeline is cut.
    with contextlib.suppress(OSError):
        writer.write_eof()
    await asyncio.wait([heard], timeout=_ORPHANS_S)
    writer.close()
    if start.failure:
        raise HedgedError(f"the server did not start: {start.failure}")
    if asked.is_set() and code in (0, -signal.SIGTERM):
        say("stopped")
        return 0
    return code if code >= 0 else 128 - code


async def _listen(reader: asyncio.StreamReader, start: _Start) -> None:
    """Take every report until all of the other side is gone."""
    with contextlib.suppress(OSError):
        while line := await reader.readline():
            start.take(line.decode(errors="replace"))


async def _any(
    task: asyncio.Task[int], *events: asyncio.Event, timeout: float | None = None
) -> None:
    """Until the task is done, one of the events is set, or so many seconds went by."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait([task, *waits], timeout=timeout, return_when=_FIRST)
    for wait in waits:
        wait.cancel()
