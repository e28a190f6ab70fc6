"""How a session is run: plainly on the CPU; on an NVIDIA device through page-locked host memory.

The device copies page-locked ("pinned") memory by itself. Any other is first copied by the driver,
piece by piece, while the caller waits. So inputs and outputs go through buffers that are pinned
once and bound to the session for each run.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort

from posthoc.contract import Array
from posthoc.runtime import CUDA, TENSORRT, session_specs

Run = Callable[[Sequence[str], Mapping[str, Array]], list[Array]]
Allocate = Callable[[int], Array]

_PORTABLE = 1  # cudaHostAllocPortable: pinned for every device
_ALIGN = 256  # bytes; a view of any dtype may begin there
_log = logging.getLogger("hedged.binding")


def choose_run(session: ort.InferenceSession, rows: Collection[str]) -> Run:
    """What runs ``session``: names of outputs and a feed → the outputs, as arrays of the caller's.

    ``rows`` names outputs that have as many rows as the inputs. Safe in several threads.
    """
    if on_device(session.get_providers()):
        return BoundRun(session, rows, pinned).run
    return lambda names, feed: list(session.run(list(names), dict(feed)))


def on_device(providers: Sequence[str]) -> bool:
    """Whether a session of these providers, in order of preference, runs on an NVIDIA device."""
    return bool(providers) and providers[0] in (CUDA, TENSORRT)


class BoundRun:
    """Runs of a session over bound host buffers, which ``allocate`` makes of a number of bytes."""

    def __init__(
        self, session: ort.InferenceSession, rows: Collection[str], allocate: Allocate
    ) -> None:
        self._session = session
        self._allocate = allocate
        self._buffer = allocate(0)
        self._lock = threading.Lock()
        outputs = session_specs(session)[1]
        # Those whose size is known before the run; ONNX Runtime makes room for the others.
        self._fixed = {
            s.name: (np.dtype(s.dtype), s.shape[1:])
            for s in outputs
            if s.name in rows
            and s.shape[:1] == (-1,)
            and -1 not in s.shape[1:]
            and s.dtype != "str"
        }

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        """The outputs ``names``. Raises what ONNX Runtime raises."""
        if not all(value.size and value.dtype.kind in "biuf" for value in feed.values()):
            return list(self._session.run(list(names), dict(feed)))
        n = max(len(value) for value in feed.values())
        wanted = {k: (d, (n, *shape)) for k, (d, shape) in self._fixed.items() if k in names}
        given = {k: (value.dtype, value.shape) for k, value in feed.items()}
        with self._lock:
            inputs, outputs = self._views(given, wanted)
            binding = self._session.io_binding()
            for name, view in inputs.items():
                np.copyto(view, feed[name])
                binding.bind_input(name, "cpu", 0, view.dtype, view.shape, view.ctypes.data)
            for name in names:
                if name in outputs:
                    view = outputs[name]
                    address = view.ctypes.data
                    binding.bind_output(name, "cpu", 0, view.dtype, view.shape, address)
                else:
                    binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            found = binding.get_outputs()
            # Copied: the next run writes to the same place.
            return [
                outputs[name].copy() if name in outputs else np.array(value.numpy())
                for name, value in zip(names, found, strict=True)
            ]

    def _views(
        self, *groups: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> list[dict[str, Array]]:
        """Arrays of the wanted dtypes and shapes, one behind the other in the buffer."""
        sizes = [{k: d.itemsize * prod(shape) for k, (d, shape) in g.items()} for g in groups]
        total = sum(-(-size // _ALIGN) * _ALIGN for group in sizes for size in group.values())
        if len(self._buffer) < total:
            self._buffer = self._allocate(2 * total)  # so that few sizes of batches make it grow
        at, found = 0, []
        for group, bytes_of in zip(groups, sizes, strict=True):
            views = {}
            for name, (dtype, shape) in group.items():
                part = self._buffer[at : at + bytes_of[name]]
                views[name] = part.view(dtype).reshape(shape)
                at += -(-bytes_of[name] // _ALIGN) * _ALIGN
            found.append(views)
        return found


def pinned(size: int) -> Array:
    """``size`` bytes of page-locked memory, freed with the array; ordinary memory, and a line in
    the log, where CUDA gives none."""
    runtime = _cuda_runtime()
    address = ctypes.c_void_p()
    if runtime is None or not size:
        return np.empty(size, np.uint8)
    if code := runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE):
        _log.warning("CUDA pins no %d bytes (error %d): copies to the device wait", size, code)
        return np.empty(size, np.uint8)
    memory = (ctypes.c_uint8 * size).from_address(address.value or 0)
    # Not at exit: CUDA may have gone by then, and the memory goes with the process.
    weakref.finalize(memory, runtime.cudaFreeHost, address).atexit = False
    return np.ctypeslib.as_array(memory)


@cache
def _cuda_runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that this onnxruntime was built for; None where there is none."""
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError:
        _log.warning("no libcudart.so.%s: copies to the device wait", major)
        return None
