"""Work for many processes, by Ray: the only page that starts it.

``RAY_ADDRESS`` names a cluster that runs; without it one is started on this machine and ended with
the work. Ray sends functions and items as pickles between its processes, and whoever reaches them
can run code: a cluster belongs on a network of its own, with Ray's token (Ray 2.60 asks for one by
default).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from posthoc.contract import HedgedError
from posthoc.runtime import core_count
from service.scoring.errors import first_line

A = TypeVar("A")
B = TypeVar("B")

ATTEMPTS = 4  # at one item, before it and not the machines is held to end the workers
AHEAD = 4  # items a worker that are taken from their source before the next result is there
_STORE = 200_000_000  # bytes of results in memory, where the cluster is this machine alone
_STARTS = 3  # of a cluster: Ray gives up after 30 s, which is short on a busy machine
_PATIENCE = 30  # seconds without a worker, after which it is said what is waited for
_POLL = 1.0  # seconds after which a wait looks whether it is to end
_END = 10.0  # seconds that are given to a worker at work to be gone

_log = logging.getLogger(__name__)


class ClusterError(HedgedError):
    """Ray is not installed, does not answer, or loses its workers."""


class WorkersLostError(ClusterError):
    """`ATTEMPTS` workers were lost over ``item``."""

    def __init__(self, message: str, item: Any):
        super().__init__(message)
        self.item = item


@contextmanager
def connect(
    workers: int | None = None, *, cpus: int = 1, gpus: float = 0, pieces: int | None = None
) -> Iterator[Mapper]:
    """A `posthoc.folds.Mapper` of at most ``workers`` processes, with ``cpus`` cores and ``gpus``
    devices each; default: as many as the cluster has cores (or devices) for. More than ``pieces``,
    if that is known, have nothing to do.

    A cluster that this process is connected to already is used, and left as it is.

    Raises ClusterError where Ray is not installed, does not start or does not answer.
    """
    if workers is not None and workers < 1:
        raise ClusterError(f"{workers} workers do nothing; give one or more")
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _start(ray, workers * cpus if workers else max(cpus, core_count()))
    most = workers or _room(ray, cpus, gpus)
    mapper = Mapper(ray, most if pieces is None else min(most, max(1, pieces)), cpus, gpus)
    try:
        yield mapper
    finally:
        mapper.close()
        if own:
            ray.shutdown()


class Mapper:
    """`map` over processes that are sent a function once and keep it, with what it has opened,
    until the next one comes.

    An item whose worker is lost is given to another one: what the function does has to bear being
    done twice. Workers that the cluster has no room for are not waited for.
    """

    def __init__(self, ray: Any, workers: int, cpus: int, gpus: float):
        self.workers = workers
        self._ray = ray
        self._cpus = cpus
        self._worker = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Worker)
        self._names = count()
        self._alive: set[Any] = set()
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}  # reference that tells that it runs -> worker
        self._failed = 0  # starts, one after the other
        self._waited = 0.0  # seconds without a worker

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        """The function's results, in the order of the items.

        Raises what the function raises, and ClusterError where `ATTEMPTS` workers were lost over
        one item or where none starts.
        """
        made: dict[int, B] = {}
        place = 0

        def draw(waiting: int, drawn: int) -> bool:
            return waiting < self.workers and drawn - place < self.workers * AHEAD

        results = self._results(function, enumerate(items), draw)
        with closing(results):
            for (at, _), result in results:
                made[at] = result
                while place in made:
                    yield made.pop(place)
                    place += 1

    def as_done(
        self, function: Callable[[A], B], items: Iterable[A], stopped: Callable[[], bool]
    ) -> Generator[tuple[A, B]]:
        """Each item with its result, in the order in which they are done.

        An item is drawn when a worker is free for it; none is once ``stopped`` says so, and those
        at work end what they do. Raises as a call does.
        """

        def draw(waiting: int, drawn: int) -> bool:
            return waiting < len(self._idle) and not stopped()

        results = self._results(function, enumerate(items), draw, stopped)
        with closing(results):
            for (_, item), result in results:
                yield item, result

    def _results(
        self,
        function: Callable[[A], B],
        source: Iterator[tuple[int, A]],
        draw: Callable[[int, int], bool],
        stopped: Callable[[], bool] | None = None,
    ) -> Generator[tuple[tuple[int, A], B]]:
        """Places and items with their results, as they come. ``draw`` says whether one more is
        drawn, from how many wait for a worker and how many were drawn. With ``stopped`` every
        worker is asked for at once, and not only as many as were drawn.
        """
        ray, name = self._ray, next(self._names)
        held = [ray.put(function)]  # in a list a reference is passed on, and read when it is needed
        waiting: deque[tuple[tuple[int, A], int]] = deque()  # place and item, attempt
        running: dict[Any, tuple[Any, tuple[tuple[int, A], int]]] = {}
        drawn, more = 0, True
        try:
            while True:
                while more and draw(len(waiting), drawn):
                    if (pair := next(source, None)) is None:
                        more = False
                    else:
                        waiting.append((pair, 1))
                        drawn += 1
                more = more and not (stopped is not None and stopped())
                if not (more or waiting or running):
                    return
                early = more and stopped is not None
                self._hire(self.workers if early else len(waiting) + len(running))
                while waiting and self._idle:
                    worker, job = self._idle.pop(), waiting.popleft()
                    running[worker.run.remote(name, held, job[0][1])] = (worker, job)
                for ref in self._finished(running):
                    worker, (pair, attempt) = running.pop(ref)
                    try:
                        result = ray.get(ref)
                    except ray.exceptions.RayTaskError as e:
                        self._idle.append(worker)
                        if isinstance(e.cause, HedgedError):
                            raise e.cause from None
                        raise
                    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as e:
                        self._end(worker)
                        if attempt == ATTEMPTS:
                            raise WorkersLostError(
                                f"{ATTEMPTS} workers were lost over one piece of work; have they "
                                f"the memory for it? The last: {first_line(e)}",
                                pair[1],
                            ) from None
                        _log.warning("a worker was lost, another does its work: %s", first_line(e))
                        waiting.appendleft((pair, attempt + 1))
                    else:
                        self._idle.append(worker)
                        yield pair, result
        finally:
            for worker, _ in running.values():
                self._end(worker)  # nobody waits for what it does
            if running:  # but for its end: what it wrote may be removed then
                ray.wait(list(running), num_returns=len(running), timeout=_END)

    def close(self) -> None:
        """End the workers, those at work too."""
        for worker in tuple(self._alive):
            self._end(worker)
        self._idle.clear()
        self._starting.clear()

    def _hire(self, work: int) -> None:
        """Ask for as many workers as there are items at hand."""
        while len(self._alive) < min(work, self.workers):
            worker = self._worker.remote(str(Path.cwd()))
            self._alive.add(worker)
            self._starting[worker.ready.remote()] = worker

    def _finished(self, running: Iterable[Any]) -> list[Any]:
        """References to work that is done, or lost; workers that have started are idle by then."""
        ray, working = self._ray, list(running)
        done, _ = ray.wait([*working, *self._starting], num_returns=1, timeout=_POLL)
        self._waited = 0.0 if done or working else self._waited + _POLL
        if self._waited == _PATIENCE:
            _log.warning(
                "no worker has started yet: the Ray cluster has %s free; each takes %s cores",
                ray.available_resources(),
                self._cpus,
            )
        for ref in [r for r in done if r in self._starting]:
            worker = self._starting.pop(ref)
            try:
                ray.get(ref)
                self._idle.append(worker)
                self._failed = 0
            except ray.exceptions.RayError as e:
                self._end(worker)
                self._failed += 1
                if self._failed == ATTEMPTS:
                    raise ClusterError(
                        f"no worker of the Ray cluster starts; is the same hedged installed on "
                        f"every machine? The last: {first_line(e)}"
                    ) from None
        return [r for r in done if r in running]

    def _end(self, worker: Any) -> None:
        if worker in self._alive:  # after `close` there is no cluster to ask
            self._alive.discard(worker)
            self._ray.kill(worker)


class _Worker:
    """A process of the cluster; one function at a time lives in it."""

    def __init__(self, folder: str):
        with suppress(OSError):  # relative paths mean the same as at home, where that folder exists
            os.chdir(folder)
        self._ray = _ray()
        self._name: int | None = None
        self._function: Any = None

    def ready(self) -> None:
        """Answers once the process runs."""

    def run(self, name: int, held: list[Any], item: Any) -> Any:
        """What the function called ``name`` makes of an item; ``held`` refers to the function."""
        if name != self._name:
            self._function = None  # two at once may be too large
            self._function, self._name = self._ray.get(held[0]), name
        return self._function(item)


def _ray() -> Any:
    # Otherwise Ray prints pages to stdout for each process that ends, and answers go there.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise ClusterError(
            "the engine ray needs Ray, which is not installed: pip install 'hedged[ray]'"
        ) from None
    return ray


def _start(ray: Any, cores: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one of ``cores`` on this machine."""
    # Nothing is told to Ray's makers; and 0 devices do not hide what a process may see, which Ray
    # warns of.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS") or "local"
    how: dict[str, Any] = {"address": address, "logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        how |= {"num_cpus": cores, "object_store_memory": _STORE, "include_dashboard": False}
    else:
        _check_answers(address)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(**how)
            break
        except Exception as e:  # Ray raises a bare Exception when a process of it is late
            ray.shutdown()
            if address != "local":
                raise ClusterError(
                    f"no Ray cluster answers at RAY_ADDRESS={address}: {first_line(e)}"
                ) from e
            if attempt == _STARTS:
                raise ClusterError(f"Ray does not start on this machine: {first_line(e)}") from e
        finally:
            # Ray puts its own in place, and a run may have one that ends it well.
            if main and handler is not None:
                signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str) -> None:
    """ClusterError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto": Ray looks for a cluster of this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {e.strerror or e}; start it, or "
            "unset the variable to use this machine"
        ) from None


def _room(ray: Any, cpus: int, gpus: float) -> int:
    """Workers that the cluster has the cores (and devices) for, at least one: it may grow."""
    there = ray.cluster_resources()
    room = there.get("CPU", 0.0) / cpus
    if gpus:
        room = min(room, there.get("GPU", 0.0) / gpus)
    return max(1, int(room))
