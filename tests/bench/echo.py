"""A side of a benchmark for the tests of its machinery."""

from __future__ import annotations

import os

import numpy as np

from bench.worker import peak_bytes, serve

MEGABYTE = 1 << 20


def double(path: str) -> None:
    """The array of an ``.npz``, twice as large."""
    with np.load(path, allow_pickle=False) as data:
        np.savez(path, value=2 * data["value"])


def talk(text: str) -> str:
    """Print on standard output, by Python and by the descriptor, then answer."""
    print(text, flush=True)
    os.write(1, text.encode())
    return text


def fail(text: str) -> None:
    """Raise."""
    raise ValueError(text)


def end(code: int) -> None:
    """End the process in the middle of a task."""
    os._exit(code)


def limits() -> list[str]:
    """The limits on threads that this process was given."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return [os.environ[name] for name in names]


def peaks(megabytes: int) -> list[int]:
    """Peaks of work that takes memory, of work that takes none, and of the first again: in
    megabytes, with as much held and let go of before."""

    def take() -> float:
        return float(np.ones(megabytes * MEGABYTE // 8).sum())

    take()
    return [peak_bytes(work) // MEGABYTE for work in (take, lambda: None, take)]


if __name__ == "__main__":
    serve({f.__name__: f for f in (double, talk, fail, end, limits, peaks)})
