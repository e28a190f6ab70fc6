"""Peers run beside us: real processes, and a real environment made by uv."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench import peers
from bench.peers import Peer, Worker, environment, exchange
from posthoc.contract import HedgedError


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker.here("tests.bench.echo", threads=3) as made:
        yield made


def test_arrays_come_back_from_another_process(worker: Worker) -> None:
    with exchange() as folder:
        path = folder / "array.npz"
        np.savez(path, value=np.arange(3.0))
        assert worker.call("double", path=str(path)) is None
        with np.load(path) as data:
            np.testing.assert_array_equal(data["value"], [0.0, 2.0, 4.0])
    assert not folder.exists()


def test_what_a_library_prints_is_no_reply(worker: Worker) -> None:
    for text in ('{"value": 1}\n', "no JSON at all\n"):
        assert worker.call("talk", text=text) == text


def test_an_error_names_module_and_task_and_the_worker_lives_on(worker: Worker) -> None:
    with pytest.raises(HedgedError, match=r"echo, task 'fail': ValueError: too bad(.|\n)*in fail"):
        worker.call("fail", text="too bad")
    with pytest.raises(HedgedError, match="KeyError"):
        worker.call("unknown")
    assert worker.call("talk", text="still here") == "still here"


def test_a_process_that_ends_is_reported(worker: Worker) -> None:
    with pytest.raises(HedgedError, match=r"exit code 7 in the task 'end'"):
        worker.call("end", code=7)
    with pytest.raises(HedgedError, match="exit code 7"):
        worker.call("talk", text="nobody hears")


def test_threads_are_limited_before_anything_is_imported(worker: Worker) -> None:
    assert worker.call("limits") == ["3"] * 3


def test_peak_memory_is_what_the_work_took(worker: Worker) -> None:
    first, nothing, again = worker.call("peaks", megabytes=64)
    assert nothing <= 1
    assert all(63 <= found <= 68 for found in (first, again))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets"


def small(monkeypatch: pytest.MonkeyPatch, *needs: str, imports: str = "tqdm.auto") -> None:
    monkeypatch.setitem(peers.PEERS, "small", Peer("small", needs, ("einconv",), imports))


def test_a_peer_has_an_environment_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "tqdm")
    python = environment("small")
    names = ["tqdm", "einconv", "einops", "numpy", "hedged", "pip"]
    said = f"import importlib.util as u; print([bool(u.find_spec(n)) for n in {names}])"
    done = subprocess.run([python, "-c", said], capture_output=True, text=True, check=True, cwd="/")
    # einconv asks for einops; a package that is installed alone brings nothing.
    assert done.stdout.strip() == "[True, True, False, False, False, False]"
    pinned = next(p for p in peers.CONSTRAINTS.read_text().splitlines() if p.startswith("tqdm=="))
    assert list(python.parent.parent.rglob(f"{pinned.replace('==', '-')}.dist-info"))
    made = python.stat().st_mtime_ns, len(list(cache.iterdir()))
    assert environment("small") == python
    assert (python.stat().st_mtime_ns, len(list(cache.iterdir()))) == made
    small(monkeypatch, "tqdm", "einops")
    assert environment("small") != python


@pytest.mark.parametrize("name", peers.PEERS)
def test_what_a_peer_needs_is_within_the_constraints(name: str) -> None:
    lines = (line.split("#")[0].strip() for line in peers.CONSTRAINTS.read_text().splitlines())
    pinned = {
        canonicalize_name(need.name): need.specifier
        for need in (Requirement(line) for line in lines if line)
    }
    for need in map(Requirement, peers.PEERS[name].needs):
        key = canonicalize_name(need.name)
        if key in pinned and need.specifier:
            assert need.specifier == pinned[key], f"{name} asks for {need}, constraints differ"


def test_an_environment_that_cannot_be_made_is_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HedgedError, match=r"no peer is called 'none'; there are laplace-torch"):
        environment("none")
    small(monkeypatch, "tqdm==0.0.1")  # against constraints.txt
    with pytest.raises(HedgedError, match=r"cannot make the environment of small(.|\n)*tqdm"):
        environment("small")
    small(monkeypatch, "tqdm", imports="einconv")  # which needs einops and torch
    with pytest.raises(HedgedError, match=r"environment of small(.|\n)*ModuleNotFoundError"):
        environment("small")
    assert not list(cache.iterdir())
