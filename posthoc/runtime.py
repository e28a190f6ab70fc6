"""ONNX Runtime sessions: which device runs a graph, and what the graph takes and gives."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from posthoc.contract import ModelError, TensorSpec

Provider = str | tuple[str, dict[str, Any]]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
    **{f"tensor({s}int{n})": f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)},
}
_LARGE = 4 << 20  # bytes of a graph that take the interpreter about ten milliseconds
_DESCRIPTORS = Path("/proc/self/fd")  # Linux
_QUIET = 4  # ONNX Runtime logs fatal errors only: everything else reaches the caller as exceptions


def choose_providers(device: str, available: Sequence[str]) -> list[Provider]:
    """Execution providers for ``device`` in order of preference; the CPU always closes the list.

    ``device`` is ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``tensorrt``. ``available`` names the
    providers that may be used; ``auto`` takes CUDA when it is among them, else the CPU. Raises
    ModelError for another device, and for one whose provider is not available.
    """
    match = re.fullmatch(r"(auto|cpu|tensorrt|cuda)(?:(?<=cuda):([0-9]+))?", device)
    if match is None:
        raise ModelError(f"device {device!r} is unknown; use auto, cpu, cuda, cuda:N or tensorrt")
    kind, index = match.groups()
    # TF32 would move scores by 1e-3 against the float32 ones that thresholds were ranked from;
    # the exhaustive search would run again for every batch size met.
    cuda = {
        "device_id": int(index or 0),
        "use_tf32": 0,
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if kind == "cpu" or (kind == "auto" and CUDA not in available):
        return [CPU]
    needed = TENSORRT if kind == "tensorrt" else CUDA
    if needed not in available:
        raise ModelError(
            f"device {device!r} needs {needed}, which this onnxruntime does not have "
            f"(it has {', '.join(available)}); install onnxruntime-gpu or use --device cpu"
        )
    if kind == "tensorrt":
        return [(TENSORRT, {"device_id": 0}), *([(CUDA, cuda)] if CUDA in available else []), CPU]
    return [(CUDA, cuda), CPU]


def core_count() -> int:
    """Cores that this process may use: fewer than there are where it is confined to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_providers() -> list[str]:
    """Providers of this onnxruntime, without those of NVIDIA when no NVIDIA device is visible."""
    found = ort.get_available_providers()
    return found if cuda_device_count() else [p for p in found if p not in {CUDA, TENSORRT}]


@cache
def cuda_device_count() -> int:
    """Number of NVIDIA devices that the driver shows to this process; 0 without a driver."""
    # onnxruntime lists CUDA wherever it was compiled in, so only the driver can tell.
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def planned_provider(device: str) -> str:
    """The provider that `open_session` will ask for first. Raises ModelError as it does."""
    return _name(_plan(device)[0])


def open_session(
    model: bytes | str | Path, *, device: str = "cpu", threads: int = 0, plan: bool = True
) -> ort.InferenceSession:
    """A session on ``device`` with all graph optimisations.

    ``threads`` is the number of threads within an operator (0: ONNX Runtime's choice). ``plan``
    False leaves out the plan of memory that a second run of the same shapes gets: it lays tensors
    side by side that could take each other's place, which is most of the memory of a graph that
    holds many samples of a row.
    ``device="auto"`` takes an NVIDIA device when there is one that works and falls back to the
    CPU. Raises ModelError when the model cannot be loaded, and when an explicitly named device
    did not start.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = plan
    auto = device == "auto"
    providers = _plan(device)
    wanted = _name(providers[0])
    if wanted != CPU and cuda_device_count():
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # the CUDA and cuDNN of pip packages
    label = "the model" if isinstance(model, bytes) else str(model)
    with _source(model) as source:
        try:
            session = _create(source, options, providers)
        except Exception as e:  # onnxruntime raises a dozen unrelated exception types
            if not auto or wanted == CPU:
                said = str(e) if isinstance(source, bytes) else str(e).replace(source, label)
                raise ModelError(f"ONNX Runtime cannot load {label} on {device}: {said}") from e
            return _create(source, options, [CPU])
    if not auto and wanted not in session.get_providers():
        seen = cuda_device_count()
        raise ModelError(
            f"{label} was to run on {device}, but {wanted} did not start and ONNX Runtime fell "
            f"back to {provider_name(session)} ({seen} NVIDIA devices are visible); "
            f"{'check CUDA and cuDNN' if seen else 'check the driver'}, or use --device cpu"
        )
    return session


def _plan(device: str) -> list[Provider]:
    # A named device is asked for even when none is visible: the driver's own complaint helps.
    auto = device == "auto"
    return choose_providers(device, usable_providers() if auto else ort.get_available_providers())


@contextlib.contextmanager
def _source(model: bytes | str | Path) -> Iterator[bytes | str]:
    """What a session is made from: the bytes of a small graph, the path of any other.

    ONNX Runtime parses bytes with the interpreter held, about 4 ms for each MB, in which a server
    answers nobody, and a file without. So many bytes go into a file of memory, which has no name
    that another process could change it by. Where there is none (not Linux) they stay bytes.
    """
    if not isinstance(model, bytes):
        yield str(model)
    elif len(model) < _LARGE or not _DESCRIPTORS.is_dir():
        yield model
    else:
        descriptor = os.memfd_create("model")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(model)
            yield f"{_DESCRIPTORS}/{descriptor}"
        finally:
            os.close(descriptor)


def _create(
    model: bytes | str, options: ort.SessionOptions, providers: list[Provider]
) -> ort.InferenceSession:
    # Without enable_fallback=0 a failure is printed and tried again on the CPU behind our back.
    return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


def provider_name(session: ort.InferenceSession) -> str:
    """The provider of first preference that a session really has."""
    return str(session.get_providers()[0])


def session_specs(
    session: ort.InferenceSession,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph: names, numpy dtype names, shapes with -1 for any size.

    Raises ModelError for a value that is not a tensor of a numpy type (a sequence or a map).
    """
    return (
        tuple(_spec(a, "input") for a in session.get_inputs()),
        tuple(_spec(a, "output") for a in session.get_outputs()),
    )


def _spec(arg: Any, what: str) -> TensorSpec:
    if arg.type not in _DTYPES:
        hint = (
            "; scikit-learn classifiers give tensors when exported with zipmap=False"
            if arg.type.startswith("seq(map")
            else ""
        )
        raise ModelError(f"{what} {arg.name!r} is {arg.type}, not a tensor of numbers{hint}")
    shape = tuple(d if isinstance(d, int) else -1 for d in arg.shape)
    return TensorSpec(name=arg.name, dtype=_DTYPES[arg.type], shape=shape)


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]
