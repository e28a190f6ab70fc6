"""The command line called in this process, and something for it to fit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hedged import cli
from tests import factory


class Result(NamedTuple):
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HEDGED_"):
            monkeypatch.delenv(name)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``hedged ARGUMENTS`` in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["hedged", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data and the names of its classes."""
    folder = tmp_path_factory.mktemp("cli")
    factory.frozen_model(folder / "model.onnx")
    factory.data(folder / "data.parquet", n=1500)
    factory.data(folder / "fresh.parquet", n=200, seed=8)
    (folder / "names.txt").write_text("a\nb\n\nc\n")
    return folder


@pytest.fixture
def fit_arguments(folder: Path, tmp_path: Path) -> list[object]:
    """What a fit needs at least; the bundle goes to ``tmp_path / "bundle"``."""
    return [
        "fit", folder / "model.onnx", "--data", folder / "data.parquet",
        "--task", "classification", "--target", "target", "--classes", folder / "names.txt",
        "--inputs", "x=a,b,c,d", "--cache", folder / "cache", "-o", tmp_path / "bundle",
    ]  # fmt: skip


def assert_one_line(done: Result, text: str, code: int = 1) -> None:
    """An error that a user can mend: nothing on stdout, one line of ours on stderr."""
    assert done.code == code
    assert done.out == ""
    own = [line for line in done.err.splitlines() if line.startswith("hedged: ")]
    assert len(own) == 1 and text in own[0], done.err
    assert "Traceback" not in done.err
