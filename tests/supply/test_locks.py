"""The lock files against pyproject.toml, constraints.txt and what the packages themselves need; and
the command that makes them, with a real resolver and packages of our own."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.locks import renew
from tests.supply.dockerfile import ROOT
from tests.supply.lockfile import Locked, parse

SERVING = ("serve-cpu", "serve-cuda")
FORBIDDEN = {"torch", "onnx", "onnxscript", "scikit-learn", "plotly", "ray", "pytest", "pip", "uv"}
# The machine that the images are for, whatever this one is.
LINUX = default_environment() | {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "os_name": "posix",
    "implementation_name": "cpython",
    "python_version": "3.11",
    "python_full_version": "3.11.15",
}


def text_of(name: str) -> str:
    return (ROOT / "deploy/locks" / f"{name}.txt").read_text("utf-8")


def lock_of(name: str) -> dict[str, Locked]:
    return {entry.name: entry for entry in parse(text_of(name))}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned}


def unmet(asked: list[str], lock: dict[str, Locked]) -> list[str]:
    """The requirements that hold for the image and that the lock does not satisfy."""
    found = []
    for line in asked:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate(LINUX | {"extra": ""}):
            continue
        have = lock.get(canonicalize_name(need.name))
        if have is None or not need.specifier.contains(have.version, prereleases=True):
            found.append(line)
    return found


def differing(lock: dict[str, Locked], pinned: dict[str, str]) -> list[str]:
    """The packages that both name, in another version."""
    both = lock.keys() & pinned.keys()
    return sorted(n for n in both if Version(lock[n].version) != Version(pinned[n]))


@pytest.mark.parametrize("name", renew.TITLES)
def test_every_line_is_a_version_with_hashes_and_no_address(name: str) -> None:
    text = text_of(name)
    entries = parse(text)
    assert len({e.name for e in entries}) == len(entries)
    assert all(len(set(e.hashes)) == len(e.hashes) > 0 for e in entries)
    assert not re.search(r"://|index-url|find-links|@ |/(root|home|work|opt|tmp)/", text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"==\S+ ", r">=1 "),
        (r"    --hash=sha256:.*\n", ""),
        (r"sha256:[0-9a-f]{10}", "sha256:"),
        (r"sha256:", "md5:"),
        (r"\A", "--extra-index-url https://example.org/simple\n"),
        (r"\A", "six==1.0\n"),
        (r"\A", "-e .\n"),
    ],
)
def test_a_line_that_is_not_is_refused(old: str, new: str) -> None:
    text = re.sub(old, new, text_of("build"))
    assert text != text_of("build")
    with pytest.raises(ValueError, match=r"no pinned package|has no hash"):
        parse(text)


@pytest.mark.parametrize("name", SERVING)
def test_the_dependencies_of_the_project_are_satisfied(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = list(project["dependencies"])
    for extra in renew.EXTRAS:
        asked += project["optional-dependencies"][extra]
    assert len(asked) > 15
    lock = lock_of(name)
    if name == "serve-cpu":  # the plain one stands in for the other
        lock["onnxruntime-gpu"] = lock.pop("onnxruntime")
    assert unmet(asked, lock) == []
    assert unmet(["numpy>=999", "nothing-of-that-name"], lock) != []
    del lock["numpy"]
    assert unmet(asked, lock) == [line for line in asked if line.startswith("numpy")]


def test_the_build_is_locked_too() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    assert unmet(asked, lock_of("build")) == []


@pytest.mark.parametrize("name", SERVING)
def test_an_image_holds_what_serves_and_nothing_that_fits(name: str) -> None:
    names = set(lock_of(name))
    assert names & FORBIDDEN == set()
    runtime = {"onnxruntime", "onnxruntime-gpu"}
    assert names & runtime == {"onnxruntime" if name == "serve-cpu" else "onnxruntime-gpu"}
    nvidia = {n for n in names if n.startswith(("nvidia-", "cuda-"))} - {"nvidia-ml-py"}
    assert bool(nvidia) is (name == "serve-cuda")


def test_both_images_run_the_tested_release_of_onnx_runtime() -> None:
    tested = constraints()["onnxruntime-gpu"]
    assert lock_of("serve-cpu")["onnxruntime"].version == tested
    assert lock_of("serve-cuda")["onnxruntime-gpu"].version == tested


def test_the_cuda_libraries_are_those_that_onnx_runtime_was_built_with() -> None:
    from onnxruntime.capi.build_and_package_info import cuda_version

    lock = lock_of("serve-cuda")
    assert metadata.version("onnxruntime-gpu") == lock["onnxruntime-gpu"].version
    for name in ("cuda-toolkit", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc"):
        assert lock[name].version.startswith(f"{cuda_version}."), name


@pytest.mark.parametrize("name", SERVING)
def test_versions_are_those_that_were_tested_together(name: str) -> None:
    lock, pinned = lock_of(name), constraints()
    assert len(lock.keys() & pinned.keys()) > 70
    assert differing(lock, pinned) == []
    assert differing(lock, pinned | {"numpy": "1.0"}) == ["numpy"]


def test_the_images_differ_by_what_runs_the_model_only() -> None:
    cpu, cuda = lock_of("serve-cpu"), lock_of("serve-cuda")
    assert {n for n in cpu if cpu[n] != cuda.get(n)} == {"onnxruntime"}
    more = {n for n in cuda if n not in cpu} - {"onnxruntime-gpu", "cuda-toolkit"}
    assert all(n.startswith("nvidia-") for n in more)


def needs(name: str, extras: set[str]) -> list[Requirement]:
    """What an installed package says it needs on the machine of the images."""
    found = [Requirement(line) for line in metadata.requires(name) or []]
    contexts = [LINUX | {"extra": extra} for extra in ("", *extras)]
    return [n for n in found if not n.marker or any(n.marker.evaluate(c) for c in contexts)]


def reached(asked: list[str], stand_in: dict[str, str]) -> tuple[set[str], set[str]]:
    """The names that requirements come to, by the metadata of what is installed here; and those
    among them that are not installed, whose own needs are unknown."""
    known: set[str] = set()
    unknown: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(line) for line in asked]
    while todo:
        need = todo.pop()
        name, extras = canonicalize_name(need.name), frozenset(need.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        known.add(name)
        try:
            todo += needs(stand_in.get(name, name), set(extras))
        except metadata.PackageNotFoundError:
            unknown.add(name)
    return known, unknown


@pytest.mark.parametrize("name", SERVING)
def test_a_lock_is_whole_and_holds_nothing_else(name: str) -> None:
    asked = renew.requirements(name)
    # The two builds of ONNX Runtime need the same; which is installed here is the machine's.
    known, unknown = reached(asked, {"onnxruntime": "onnxruntime-gpu"})
    names = set(lock_of(name))
    assert known - names == set()
    if name == "serve-cpu":
        assert (names - known, unknown) == (set(), set())
    else:
        assert all(n.startswith("nvidia-") for n in names - known)
        assert unknown == {n for n in known if n.startswith(("nvidia-", "cuda-"))} - {
            "nvidia-ml-py"
        }
    without, _ = reached([a for a in asked if not a.startswith("bentoml")], {})
    assert "kantoku" in names - without


def wheel(folder: Path, name: str, version: str, *requires: str) -> str:
    """A wheel with nothing in it but what it needs; its sha256."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    for line in requires:
        lines += [f"Requires-Dist: {line}"]
        lines += re.findall(r"extra == '(\w+)'", line) and ["Provides-Extra: cuda"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two dependencies, and a folder of wheels in the place of an index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.28", "1.31", "1.32"):
        wheel(wheels, "onnxruntime", version)
        wheel(wheels, "onnxruntime-gpu", version, "nvidia-x; extra == 'cuda'")
    wheel(wheels, "nvidia-x", "13.0")
    for version in ("13.0.1", "13.1.0"):
        wheel(wheels, "cuda-toolkit", version)
    for version in ("2.0", "2.1"):
        wheel(wheels, "below", version)
        wheel(wheels, "above", version, "below>=2")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["below"]\n[project]\nname = "p"\nversion = "1"\n'
        'dependencies = ["above>=2", "onnxruntime-gpu>=1.28; os_name == \'a\'", '
        "\"onnxruntime>=1.28; os_name == 'b'\"]\n"
        "[project.optional-dependencies]\n" + "".join(f"{e} = []\n" for e in renew.EXTRAS)
    )
    (tmp_path / "constraints.txt").write_text("onnxruntime-gpu==1.31\n")
    (tmp_path / "deploy/locks").mkdir(parents=True)
    for key in [k for k in os.environ if k.startswith("UV_")]:
        monkeypatch.delenv(key)
    (tmp_path / "uv.toml").write_text(f'[pip]\nno-index = true\nfind-links = ["{wheels}"]\n')
    monkeypatch.setenv("UV_CONFIG_FILE", str(tmp_path / "uv.toml"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def versions(text: str) -> dict[str, str]:
    return {entry.name: entry.version for entry in parse(text)}


def test_the_command_locks_each_image_and_keeps_what_is_locked(project: Path) -> None:
    cpu = renew.resolve("serve-cpu", root=project)
    assert versions(cpu) == {"above": "2.1", "below": "2.1", "onnxruntime": "1.31"}
    assert str(project) not in cpu
    data = (project / "wheels/above-2.1-py3-none-any.whl").read_bytes()
    assert f"--hash=sha256:{hashlib.sha256(data).hexdigest()}" in cpu
    assert "    # via above\n" in cpu
    cuda = renew.resolve("serve-cuda", root=project)
    assert versions(cuda) == {
        **{"above": "2.1", "below": "2.1", "onnxruntime-gpu": "1.31"},
        **{"cuda-toolkit": "13.0.1", "nvidia-x": "13.0"},
    }
    assert versions(renew.resolve("build", root=project)) == {"below": "2.1"}
    (project / "deploy/locks/serve-cpu.txt").write_text(cpu)
    wheel(project / "wheels", "below", "2.2")
    assert renew.resolve("serve-cpu", root=project) == cpu
    assert versions(renew.resolve("serve-cpu", root=project, upgrade=True))["below"] == "2.2"


def test_an_address_does_not_get_into_a_lock(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = f"below @ file://{project}/wheels/below-2.1-py3-none-any.whl"
    monkeypatch.setattr(renew, "requirements", lambda *_: [direct])
    with pytest.raises(ValueError, match="an address stands in the lock file"):
        renew.resolve("build", root=project)


def test_what_nothing_satisfies_is_no_lock(project: Path) -> None:
    text = (project / "pyproject.toml").read_text().replace("above>=2", "above>=3")
    (project / "pyproject.toml").write_text(text)
    with pytest.raises(subprocess.CalledProcessError):
        renew.resolve("serve-cpu", root=project)
