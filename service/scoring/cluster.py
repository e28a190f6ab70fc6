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
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from posthoc.contract import HedgedError
from posthoc.runtime import core_count

A = TypeVar("A")
B = TypeVar("B")

ATTEMPTS = 4  # at one item, before it and not the machines is held to end the workers
AHEAD = 4  # items a worker that are taken from their source before the next result is there
_STORE = 200_000_000  # bytes of results in memory, where the cluster is this machine alone
_STARTS = 3  # of a cluster: Ray gives up after 30 s, which is short on a busy machine
_PATIENCE = 30.0  # seconds without a worker, after which it is said what is waited for

_log = logging.getLogger(__name__)


class ClusterError(HedgedError):
    """Ray is not installed, does not answer, or loses its workers."""


@contextmanager
def connect(workers: int | None = None, *, gpus: float = 0) -> Iterator[Mapper]:
    """A `posthoc.folds.Mapper` of at most ``workers`` processes, with a core and ``gpus`` devices
    each; default: as many as the cluster has cores (or devices) for.

    A cluster that this process is connected to already is used, and left as it is.

    Raises ClusterError where Ray is not installed, does not start or does not answer.
    """
    if workers is not None and workers < 1:
        raise ClusterError(f"{workers} workers do nothing; give one or more")
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _start(ray, workers or core_count())
    mapper = Mapper(ray, workers or _room(ray, gpus), gpus)
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

    def __init__(self, ray: Any, workers: int, gpus: float):
        self.workers = workers
        self._ray = ray
        self._worker = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Worker)
        self._names = count()
        self._alive: set[Any] = set()
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}  # reference that tells that it runs -> worker
        self._failed = 0  # starts, one after the other

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        """The function's results, in the order of the items.

        Raises what the function raises, and ClusterError where `ATTEMPTS` workers were lost over
        one item or where none starts.
        """
        ray, name = self._ray, next(self._names)
        held = [ray.put(function)]  # in a list a reference is passed on, and read when it is needed
        source = enumerate(items)
        waiting: deque[tuple[int, A, int]] = deque()  # place, item, attempt
        running: dict[Any, tuple[Any, tuple[int, A, int]]] = {}
        made: dict[int, B] = {}
        place, drawn, more = 0, 0, True
        try:
            while True:
                while more and len(waiting) < self.workers and drawn - place < self.workers * AHEAD:
                    if (pair := next(source, None)) is None:
                        more = False
                    else:
                        waiting.append((*pair, 1))
                        drawn += 1
                self._hire(len(waiting) + len(running))
                while waiting and self._idle:
                    worker, job = self._idle.pop(), waiting.popleft()
                    running[worker.run.remote(name, held, job[1])] = (worker, job)
                if place in made:
                    yield made.pop(place)
                    place += 1
                    continue
                if not (waiting or running):
                    return
                for ref in self._finished(running):
                    worker, job = running.pop(ref)
                    at, item, attempt = job
                    try:
                        made[at] = ray.get(ref)
                        self._idle.append(worker)
                    except ray.exceptions.RayTaskError as e:
                        self._idle.append(worker)
                        if isinstance(e.cause, HedgedError):
                            raise e.cause from None
                        raise
                    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as e:
                        self._end(worker)
                        if attempt == ATTEMPTS:
                            raise ClusterError(
                                f"{ATTEMPTS} workers were lost over one piece of work; have they "
                                f"the memory for it? The last: {_short(e)}"
                            ) from None
                        waiting.appendleft((at, item, attempt + 1))
        finally:
            for worker, _ in running.values():
                self._end(worker)  # nobody waits for what it does

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
        done, _ = ray.wait([*working, *self._starting], num_returns=1, timeout=_PATIENCE)
        if not done and not working:
            _log.warning(
                "no worker has started yet: the Ray cluster has %s free; each takes a core",
                ray.available_resources(),
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
                        f"every machine? The last: {_short(e)}"
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
                    f"no Ray cluster answers at RAY_ADDRESS={address}: {_short(e)}"
                ) from e
            if attempt == _STARTS:
                raise ClusterError(f"Ray does not start on this machine: {_short(e)}") from e
        finally:
            if (
                main and handler is not None
            ):  # Ray puts its own in place, and a run may have one that ends it well
                signal.signal(signal.SIGTERM, handler)


def _room(ray: Any, gpus: float) -> int:
    """Workers that the cluster has the cores (and devices) for, at least one: it may grow."""
    there = ray.cluster_resources()
    room = there.get("CPU", 0.0)
    if gpus:
        room = min(room, there.get("GPU", 0.0) / gpus)
    return max(1, int(room))


def _short(error: BaseException) -> str:
    """The first line of an error that Ray makes many of."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
