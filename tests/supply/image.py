"""An image without Docker: the Dockerfile's own COPY and RUN of one target, in a folder that stands
for its root. A virtual environment takes the place of the base image's Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.supply.dockerfile import ROOT, Dockerfile, Instruction, context, read

PLACES = ("/opt/hedged", "/src", "/wheels")  # what the stages that install write


@dataclass(frozen=True, slots=True)
class Image:
    """What was installed for one target, under ``root``."""

    root: Path
    target: str

    @property
    def python(self) -> Path:
        """The interpreter of the image's environment."""
        return self.root / "opt/hedged/bin/python"

    @property
    def site(self) -> Path:
        """Where its packages lie."""
        (found,) = (self.root / "opt/hedged/lib").glob("python3.*/site-packages")
        return found

    def environment(self, writable: Path) -> dict[str, str]:
        """The image's variables and nothing of this process; /data and /tmp are in ``writable``."""
        # What is written without Python, for one who has no home in the image, is found there.
        found = {"HOME": str(writable.parent / "home"), "LC_ALL": "C.UTF-8"}
        for key, value in read().environment(self.target).items():
            value = value.replace("$PATH", os.defpath).replace(
                "/opt/hedged", self._of("/opt/hedged")
            )
            if re.match(r"/(data|tmp)(/|$)", value):
                value = f"{writable}{value}"
            found[key] = value
        for place in (writable / "data", writable / "tmp", writable.parent / "home"):
            place.mkdir(exist_ok=True)
        return found | {"TMPDIR": str(writable / "tmp")}

    def _of(self, place: str) -> str:
        return f"{self.root}{place}"


def build(target: str, root: Path) -> Image:
    """Run the stages that the target copies from, in their order."""
    made, image = read(), Image(root, target)
    (copied,) = [s.source for s in made.chain(target) if s.name == "COPY" and s.source]
    subprocess.run([sys.executable, "-m", "venv", root / "base"], check=True)
    done: list[Instruction] = []
    for name in _needed(made, copied):
        for step in made.chain(name):
            if step not in done:  # stages that begin with the same one share what it did
                _run(step, image)
                done.append(step)
    return image


def _needed(made: Dockerfile, stage: str) -> list[str]:
    before = [s.source for s in made.chain(stage) if s.name == "COPY" and s.source]
    return [name for source in before for name in _needed(made, source)] + [stage]


def _run(step: Instruction, image: Image) -> None:
    if step.name == "COPY" and step.source is None:
        *sources, target = step.words
        assert target.startswith("./"), step
        for name in context():
            for source in sources:
                if name == source or name.startswith(f"{source}/"):
                    inside = name.removeprefix(source)
                    whole = target + name if target == "./" else target + inside
                    place = image.root / "src" / whole
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / name, place)
    elif step.name == "COPY":
        # All stages share one root here, so what is copied between them must keep its place.
        assert step.words[0] == step.words[1]
        assert (image.root / step.words[0].lstrip("/")).is_dir()
    elif step.name == "RUN":
        command = step.words[0]
        for place in PLACES:
            command = command.replace(place, f"{image.root}{place}")
        (image.root / "src").mkdir(exist_ok=True)
        environ = {
            k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTHON"))
        }
        environ["PATH"] = f"{image.root}/base/bin:{os.defpath}"
        subprocess.run(
            command, shell=True, check=True, cwd=image.root / "src", env=environ, timeout=900
        )
    else:
        assert step.name in {"ENV", "WORKDIR"}, step
