"""Whether a built image does what it promises, in a real container:

    docker build -t hedged . && python deploy/check_image.py hedged demo/bundle
    python deploy/check_image.py hedged demo/bundle --engine "podman --runtime runc"
    python deploy/check_image.py hedged demo/bundle --run-options="--memory 2g --cpus 2"

It runs as compose.yaml and the pods do: nobody writes to its root, no capabilities, a user without
rights. It must become healthy, answer the bundle's golden rows as the bundle has them, hold neither
torch nor pip nor a compiler, and end with 0 when it is asked to. Its port is published to this
machine alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GRACE_S = 50  # as stop_grace_period in compose.yaml
START_S = 120
ROWS = 8
TOLERANCE = 1e-5  # of a probability: another processor rounds otherwise
OPTIONS = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--publish", "127.0.0.1::3000"),
    *("--security-opt", "no-new-privileges", "--env", "HEDGED_OPEN=true"),
)
INSIDE = """
import importlib.util, json, os, shutil
def may_write(folder):
    try:
        open(os.path.join(folder, "probe"), "w").close()
    except OSError:
        return False
    return True
print(json.dumps({
    "user": os.getuid(),
    "writes": [f for f in ("/", "/opt/hedged", "/usr", "/etc", "/data", "/tmp") if may_write(f)],
    "holds": [n for n in ("torch", "pip", "pytest") if importlib.util.find_spec(n)]
    + [n for n in ("gcc", "cc", "pip") if shutil.which(n)],
}))
"""


class CheckError(Exception):
    """What the image does not do."""


@dataclass(frozen=True, slots=True)
class Container:
    """A container that was started, by the command of its engine."""

    engine: tuple[str, ...]
    name: str

    def tell(self, *arguments: str) -> str:
        """Standard output of a command of the engine; CheckError with its words when it fails."""
        return _run([*self.engine, *arguments])

    def field(self, template: str) -> Any:
        """A value that ``inspect`` has."""
        return json.loads(self.tell("inspect", "--format", f"{{{{json {template}}}}}", self.name))


def check(engine: Sequence[str], image: str, bundle: Path, more: Sequence[str] = ()) -> list[str]:
    """Start a container of the image over a bundle, and say what was found right, a line each.

    Raises CheckError for the first thing that is not.
    """
    mount = f"{bundle.resolve()}:/bundles:ro"
    command = [*engine, "create", *OPTIONS, "--volume", mount, *more, image]
    name = _run(command).strip().splitlines()[-1]
    container = Container(tuple(engine), name)
    try:
        container.tell("start", name)
        return _checked(container, bundle)
    except CheckError as e:
        raise CheckError(f"{e}\n{_log(container)}") from None
    finally:
        subprocess.run([*engine, "rm", "--force", "--volumes", name], capture_output=True)


def _checked(container: Container, bundle: Path) -> list[str]:
    address = "http://" + container.tell("port", container.name, "3000").split()[0]
    said = [f"ready after {_ready(container, address):.0f} s"]
    test = container.field(".Config.Healthcheck.Test")
    if not test:
        raise CheckError("the image has no health check (podman build needs --format docker)")
    container.tell("exec", container.name, *test[1:])
    said.append("its health check passes")
    said.append(f"{_golden(address, bundle)} golden rows are answered as the bundle has them")
    inside = json.loads(container.tell("exec", container.name, "python", "-c", INSIDE))
    if inside["user"] == 0 or inside["holds"] or inside["writes"] != ["/data", "/tmp"]:
        raise CheckError(f"within: {inside}")
    said.append(f"user {inside['user']} writes to /data and /tmp alone; no torch, pip or compiler")
    started = time.monotonic()
    container.tell("stop", "-t", str(GRACE_S), container.name)
    took, code = time.monotonic() - started, container.field(".State.ExitCode")
    if code != 0:
        raise CheckError(f"it ended with {code}, {took:.0f} s after it was asked to")
    return [*said, f"it ended with 0, {took:.0f} s after it was asked to"]


def _ready(container: Container, address: str) -> float:
    """Seconds until it answers that it is ready."""
    started = time.monotonic()
    while time.monotonic() - started < START_S:
        if container.field(".State.Status") == "exited":
            raise CheckError("the container ended")
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=2):
                return time.monotonic() - started
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise CheckError(f"not ready after {START_S} s")


def _golden(address: str, bundle: Path) -> int:
    """How many golden rows got the probabilities, or means, of the bundle."""
    with np.load(bundle / "golden.npz", allow_pickle=False) as data:
        inputs = {k[3:]: data[k][:ROWS] for k in data.files if k.startswith("in/")}
        field = "probs" if "out/probs" in data.files else "mean"
        expected = data[f"out/{field}"][:ROWS]
    body = {"inputs": {k: v.tolist() for k, v in inputs.items()}, "outputs": [field]}
    request = urllib.request.Request(
        f"{address}/v1/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            rows = json.load(answer)["predictions"]
    except urllib.error.HTTPError as e:
        raise CheckError(f"golden rows: {e.code} {e.read().decode(errors='replace')}") from None
    found = np.asarray([row[field] for row in rows], np.float64).reshape(expected.shape)
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise CheckError(f"golden rows differ by up to {np.abs(found - expected).max():.1e}")
    return len(found)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S + GRACE_S)
    if done.returncode:
        raise CheckError(f"{shlex.join(command[:6])} … failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _log(container: Container) -> str:
    done = subprocess.run([*container.engine, "logs", container.name], capture_output=True)
    return (done.stdout + done.stderr).decode(errors="replace")[-2000:]


def main() -> None:
    """Check what the command line names; exit code 1 and the log when something is not right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="docker", help="docker, podman, with options or not")
    parser.add_argument("--run-options", default="", help="more options of the engine's create")
    asked = parser.parse_args()
    engine = shlex.split(asked.engine)
    if shutil.which(engine[0]) is None:
        raise SystemExit(f"there is no {engine[0]} here; name what runs containers by --engine")
    if not (asked.bundle / "golden.npz").exists():
        raise SystemExit(f"{asked.bundle} is no bundle; `make demo` makes demo/bundle")
    try:
        for line in check(engine, asked.image, asked.bundle, shlex.split(asked.run_options)):
            print(line)
    except CheckError as e:
        sys.exit(f"{asked.image}: {e}")


if __name__ == "__main__":
    main()
