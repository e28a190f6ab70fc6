"""Other people's libraries, each in an environment of its own, run as a process beside ours.

An environment is made on first use (uv) and kept in the asset cache: its folder is named by a
digest of what it holds, so a changed pin makes a new one. Requirements are the few packages that
the peer imports, at the versions of constraints.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.assets import cached
from posthoc.contract import HedgedError

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
MINUTES = 20


@dataclass(frozen=True, slots=True)
class Peer:
    """A library: packages installed with what they need, packages installed alone, and the import
    that shows that it works."""

    name: str
    needs: tuple[str, ...]
    alone: tuple[str, ...]
    imports: str


PEERS = {
    "laplace-torch": Peer(
        "laplace-torch",
        # Through backpack it asks for torchvision, of which it imports nothing and whose usual
        # build does not load beside a CPU torch; hence the list by hand.
        needs=(
            "einconv",
            "einops",
            "linear-operator",
            "numpy",
            "opt-einsum",
            "scipy",
            "torch",
            "torchmetrics",
            "tqdm",
        ),
        alone=(
            "laplace-torch==0.3",
            "asdfghjkl==0.1a4",
            "backpack-for-pytorch==1.7.1",
            "curvlinops-for-pytorch==3.0.1",
            "unfoldNd==0.2.3",
        ),
        imports="laplace",
    ),
    "torch-uncertainty": Peer(
        "torch-uncertainty",
        # Its list, without the parts of lightning that ask for an older rich; it imports the hub's
        # client without naming it. `bench.abnn_peer` makes torchvision load.
        needs=(
            "einops",
            "huggingface-hub==2.4.0",
            "lightning==2.6.6",
            "numpy",
            "pandas",
            "pillow",
            "pyyaml",
            "rich",
            "safetensors",
            "scikit-learn",
            "scipy",
            "seaborn==0.13.2",
            "torch",
            "torchmetrics",
        ),
        alone=("torch-uncertainty==0.13.0", "timm==1.0.31", "torchvision==0.28.0"),
        imports="bench.abnn_peer",
    ),
    "mapie": Peer(
        "mapie",
        needs=("numpy", "scikit-learn", "scipy"),
        alone=("mapie==1.6.0",),
        imports="bench.conformal_mapie",
    ),
    "pytorch-ood": Peer(
        "pytorch-ood",
        # Its list; scikit-learn is what its nearest neighbours ask for.
        needs=("numpy", "pillow", "scikit-learn", "scipy", "torch", "typing-extensions"),
        alone=("pytorch-ood==0.4.0", "torchvision==0.28.0"),
        imports="bench.ood_peer",
    ),
    "mlserver": Peer(
        "mlserver",
        # Its list; it asks for older versions than ours of what is installed alone beside it.
        needs=(
            "aiofiles==25.1.0",
            "aiokafka==0.14.0",
            "click",
            "gevent",
            "geventhttpclient",
            "grpcio==1.85.3",
            "httptools",
            "numpy",
            "onnxruntime==1.31.1",
            "opentelemetry-exporter-otlp-proto-grpc==1.45.1",
            "opentelemetry-instrumentation-fastapi==0.66b1",
            "opentelemetry-instrumentation-grpc==0.66b1",
            "opentelemetry-sdk",
            "orjson",
            "pandas",
            "prometheus-client",
            "py-grpc-prometheus==0.8.0",
            "pydantic",
            "pydantic-settings",
            "python-dotenv",
            "python-multipart",
            "starlette-exporter==0.24.0",
            "tritonclient[http]",
            "uvicorn",
            "uvloop",
        ),
        alone=(
            "mlserver==1.7.1",
            "fastapi==0.115.14",
            "importlib-resources==6.5.2",
            "protobuf==6.33.6",
            "starlette==0.46.2",
        ),
        imports="bench.http_mlserver",
    ),
    "torchcp": Peer(
        "torchcp",
        # LGPL: it runs in this environment of a benchmark and nothing of ours imports it. Its list
        # without torchsort, a compiled sort that one training loss uses: `bench.conformal_torchcp`.
        needs=(
            "networkx",
            "numpy",
            "pandas",
            "pillow",
            "scikit-learn",
            "setuptools",
            "torch",
            "torch-geometric==2.8.0",
            "tqdm",
            "transformers==5.0.0",
        ),
        alone=("torchcp==1.2.1", "torchvision==0.28.0"),
        imports="bench.conformal_torchcp",
    ),
}


def environment(name: str) -> Path:
    """The Python interpreter of a peer's environment, made on first use (about 1 GB, a minute).

    Raises HedgedError for an unknown peer, and with what the installer said where it failed.
    """
    if name not in PEERS:
        raise HedgedError(f"no peer is called {name!r}; there are {', '.join(sorted(PEERS))}")
    peer = PEERS[name]
    folder = cached(f"peer-{name}-{_digest(peer)}", lambda made: _install(peer, made))
    return _interpreter(folder)


def _digest(peer: Peer) -> str:
    text = [*peer.needs, *peer.alone, CONSTRAINTS.read_text(), sys.version]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _install(peer: Peer, folder: Path) -> None:
    try:
        import uv
    except ImportError:
        raise HedgedError(
            f"the environment of {peer.name} is made with uv: pip install -e '.[dev]'"
        ) from None
    tool = uv.find_uv_bin()
    python = _interpreter(folder)
    # --relocatable and --clear: the folder is moved to its final name when it is whole.
    _run(peer, [tool, "venv", "-q", "--clear", "--relocatable", "-p", sys.executable, str(folder)])
    install = [tool, "pip", "install", "-q", "-p", str(python)]
    _run(peer, [*install, "-c", str(CONSTRAINTS), *_torch_source(), *peer.needs])
    _run(peer, [*install, "--no-deps", *peer.alone])
    _run(peer, [str(python), "-W", "ignore", "-c", f"import {peer.imports}"])


def _torch_source() -> list[str]:
    """Where the CPU build of torch comes from: local wheels if pip was told of some, else the
    project's own index (the file on PyPI needs CUDA)."""
    local = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if local is None:
        return ["--torch-backend", "cpu"]
    return [part for place in local.replace(",", " ").split() for part in ("--find-links", place)]


def _run(peer: Peer, command: Sequence[str]) -> None:
    said = f"cannot make the environment of {peer.name}: {' '.join(command[:4])} …"
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        raise HedgedError(f"{said} took more than {MINUTES} minutes") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HedgedError(f"{said}\n" + ("\n".join(lines[-8:]) or f"exit {done.returncode}"))


class Worker:
    """A module of ``bench`` that serves tasks (`bench.worker.serve`), as a child process.

    ``threads`` limits every numerical library in it, ``environ`` is more of its environment. Use it
    as a context manager: the process ends with it.
    """

    def __init__(
        self,
        python: Path | str,
        module: str,
        *,
        threads: int = 1,
        environ: Mapping[str, str] | None = None,
    ):
        limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        self._module = module
        self._child = subprocess.Popen(
            [str(python), "-W", "ignore", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                **dict.fromkeys(limits, str(threads)),
                "PYTHONPATH": str(ROOT),
                **(environ or {}),
            },
            text=True,
            encoding="utf-8",
        )

    @classmethod
    def here(
        cls, module: str, *, threads: int = 1, environ: Mapping[str, str] | None = None
    ) -> Self:
        """A worker in the environment of this process."""
        return cls(sys.executable, module, threads=threads, environ=environ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        if kind is not None:  # do not wait for a task that nobody wants any more
            self._child.kill()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()

    def call(self, task: str, **given: Any) -> Any:
        """The value of a task. Raises HedgedError with the task's own error, or when it died."""
        assert self._child.stdin is not None and self._child.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps({"task": task, "with": given}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            raise HedgedError(f"{self._module} ended with exit code {code} in the task {task!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise HedgedError(f"{self._module}, task {task!r}: {reply['error']}\n{reply['trace']}")
        return reply["value"]


@contextlib.contextmanager
def exchange() -> Iterator[Path]:
    """A temporary folder for the files that two sides exchange."""
    with tempfile.TemporaryDirectory(prefix="hedged-bench-") as folder:
        yield Path(folder)
