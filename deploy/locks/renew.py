"""Make the lock files of the images anew, for Linux x86-64 and the Python that they run:

    python deploy/locks/renew.py             keeps what is locked, as far as pyproject.toml lets it
    python deploy/locks/renew.py --upgrade   takes the newest releases that constraints.txt lets it
    python deploy/locks/renew.py --check     writes nothing, and fails where a file would change

``serve-cpu.txt`` and ``serve-cuda.txt`` are what serving needs (the dependencies of pyproject.toml
and its extras EXTRAS), ``build.txt`` what makes the wheel of Hedged itself. Only wheels are taken,
so that an installation runs no code of theirs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
EXTRAS = ("postgres", "verify")
# The release of CUDA that the locked ONNX Runtime was built with. What the compiler of a later 13.x
# (nvrtc) makes while a model runs, the oldest driver of CUDA 13 may refuse.
CUDA = "cuda-toolkit[cublas,cudart,cufft,curand,nvjitlink,nvrtc]==13.0.*"
TITLES = {
    "serve-cpu": "What the image of the target `cpu` installs",
    "serve-cuda": "What the image of the target `cuda` installs",
    "build": "What makes the wheel of Hedged",
}


def requirements(name: str, root: Path = ROOT) -> list[str]:
    """What the lock file ``name`` is resolved from."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    if name == "build":
        return list(pyproject["build-system"]["requires"])
    project = pyproject["project"]
    asked = list(project["dependencies"])
    for extra in EXTRAS:
        asked += project["optional-dependencies"][extra]
    # Which ONNX Runtime is a matter of the image here, and not of the machine that resolves. Both
    # images take the release that the tests ran with.
    others = [line for line in asked if not line.startswith("onnxruntime")]
    runtime = "onnxruntime-gpu" if name == "serve-cuda" else "onnxruntime"
    (asked_for,) = [line for line in asked if re.match(rf"{runtime}[^-]", line)]
    wanted = asked_for.partition(";")[0].strip().removeprefix(runtime)
    constraints = (root / "constraints.txt").read_text("utf-8")
    tested = re.search(r"^onnxruntime-gpu(==\S+)$", constraints, re.M)
    exact = f"{tested[1]},{wanted}" if tested else wanted
    if name == "serve-cpu":
        return [*others, f"onnxruntime{exact}"]
    return [*others, f"onnxruntime-gpu[cuda,cudnn]{exact}", CUDA]


def resolve(name: str, *, upgrade: bool = False, root: Path = ROOT) -> str:
    """The text of one lock file. Raises CalledProcessError where nothing satisfies all of it, and
    ValueError where the address of an index would stand in it."""
    present = root / "deploy" / "locks" / f"{name}.txt"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock.txt"
        if present.exists() and not upgrade:
            out.write_text(present.read_text("utf-8"), "utf-8")  # uv keeps what it finds there
        command = [
            sys.executable, "-m", "uv", "pip", "compile", "-",
            "--output-file", str(out), "--quiet", "--no-header", "--annotation-style", "line",
            "--generate-hashes", "--only-binary", ":all:", "--no-emit-index-url",
            "--python-version", PYTHON, "--python-platform", PLATFORM,
            "--constraints", "constraints.txt",
        ]  # fmt: skip
        environ = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
        subprocess.run(
            command,
            input="\n".join(requirements(name, root)),
            cwd=root,
            env=environ,
            text=True,
            check=True,
        )
        text = out.read_text("utf-8")
    text = re.sub(r"(, )?-c constraints\.txt", "", text)
    text = re.sub(r"^    # via\s*\n", "", text, flags=re.M)
    if "://" in text:
        raise ValueError(f"{name}: an address stands in the lock file")
    heading = f"# {TITLES[name]}: Linux x86-64, Python {PYTHON}. `make locks` makes it anew.\n"
    return heading + text


def main() -> int:
    """Write every lock file; with --check 1 where one is not what it would be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest releases")
    parser.add_argument("--check", action="store_true", help="write nothing, say what would change")
    options = parser.parse_args()
    stale = []
    for name in TITLES:
        path = HERE / f"{name}.txt"
        text = resolve(name, upgrade=options.upgrade)
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(text, "utf-8")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale) or 'none'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
