"""Stopping without losing a request.

``hedged serve`` (hedged.supervisor) keeps one end of a pair of sockets; BentoML's process and its
workers inherit the other, and a worker that is started again does so too. Nothing is ever sent to
them. The end of file says that ``hedged serve`` wants to stop, or is gone: either way a worker
answers on, says that it is not ready, and closes each connection after its answer.

There is no such socket under plain ``bentoml serve`` or uvicorn, and there this does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posthoc.contract import HedgedError

# Holds the descriptor and its giver's process id. Between our own processes: no setting (HEDGED_*).
LIFELINE = "_HEDGED_LIFELINE"
# What a worker reports; UNSERVED of each model that it starts without.
STARTING, READY, FAILED, UNSERVED = "starting", "ready", "failed", "unserved"
_MAX_REPORT = 2000  # characters; a short write to such a socket is never torn
_LOOK_S = 0.2
_log = logging.getLogger("hedged.drain")


def handed_down(descriptor: int) -> str:
    """What LIFELINE says to the children of this process."""
    return f"{descriptor} {os.getpid()}"


class Lifeline:
    """This process's end of the pair. ``cut`` is True once ``hedged serve`` stops or is gone."""

    def __init__(self, descriptor: int, parent: int) -> None:
        self.cut = False
        self._descriptor = descriptor
        self._parent = parent

    @classmethod
    def inherited(cls) -> Lifeline | None:
        """The one that ``hedged serve`` handed down; None where it did not start this process."""
        given = os.environ.get(LIFELINE)
        return None if given is None else cls(*map(int, given.split()))

    def watch(self) -> None:
        """From now on notice the end of file, in a thread of its own.

        Where it came because the parent of this process was killed, the process ends itself as
        SIGTERM does: without its parent nobody else would, and a worker would hold the port.
        """
        threading.Thread(target=self._watch, name="hedged-lifeline", daemon=True).start()

    def hand_down(self) -> None:
        """Give it to the children of this process, who must end when this one does."""
        os.environ[LIFELINE] = handed_down(self._descriptor)

    def report(self, what: str, text: str = "") -> None:
        """Tell ``hedged serve`` one of STARTING, READY, and FAILED or UNSERVED with its reason."""
        line = " ".join(f"{what} {text}".split())[:_MAX_REPORT]
        with contextlib.suppress(OSError):  # it is gone
            os.write(self._descriptor, f"{line}\n".encode())

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Report what is raised inside."""
        try:
            yield
        except Exception as e:
            self.report(FAILED, str(e) if isinstance(e, HedgedError) else repr(e))
            raise

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # reset: it was killed before it read every report
            while os.read(self._descriptor, 1):
                pass
        self.cut = True
        while os.getppid() == self._parent:  # who will end this process
            time.sleep(_LOOK_S)
        _log.warning("process %d stops: its parent was killed", os.getpid())
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGTERM)


def watched() -> contextlib.AbstractContextManager[None]:
    """Around what the workers' parent does before it starts them: from then on it watches its
    lifeline, where it has one, and hands it down; what is raised inside is reported."""
    lifeline = Lifeline.inherited()
    if lifeline is None:
        return contextlib.nullcontext()
    lifeline.watch()
    lifeline.hand_down()
    return lifeline.failures()


class Drain:
    """The outermost ASGI layer: reports the start, and while the lifeline is cut marks each request
    (``scope["hedged.draining"]``) and closes its connection after the answer."""

    def __init__(self, app: ASGIApp, lifeline: Lifeline | None) -> None:
        self.app = app
        self.lifeline = lifeline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lifeline = self.lifeline
        if lifeline is None or scope["type"] not in ("http", "lifespan"):
            await self.app(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(lifeline, scope, receive, send)
        else:
            scope["hedged.draining"] = lifeline.cut

            async def closing(message: Message) -> None:
                # Asked now: the drain may have begun while the request was being answered.
                if lifeline.cut and message["type"] == "http.response.start":
                    headers = [h for h in message["headers"] if h[0].lower() != b"connection"]
                    message = {**message, "headers": [*headers, (b"connection", b"close")]}
                await send(message)

            await self.app(scope, receive, closing)

    async def _live(self, lifeline: Lifeline, scope: Scope, receive: Receive, send: Send) -> None:
        lifeline.watch()
        lifeline.report(STARTING)

        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                lifeline.report(READY)
            await send(message)

        with lifeline.failures():
            await self.app(scope, receive, started)
