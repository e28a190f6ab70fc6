"""``hedged compare`` on the command line: tables, files, JSON and wrong usage."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest

from calibration.comparison.records import Comparison
from tests import factory
from tests.hedged.conftest import Call, assert_one_line


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> list[object]:
    return [
        "compare", folder / "model.onnx", "--data", folder / "data.parquet",
        "--task", "classification", "--target", "target", "--classes", folder / "names.txt",
        "--inputs", "x=a,b,c,d", "--cache", folder / "cache", "--id", "id", "--splits", "2",
        "--workers", "1", "-o", tmp_path / "out",
    ]  # fmt: skip


def test_a_person_reads_tables_and_a_command(
    call: Call, arguments: list[object], folder: Path, tmp_path: Path
) -> None:
    factory.data(folder / "later.parquet", n=300, seed=11)
    done = call(
        *arguments, "--methods", "laplace_diag,gaussian", "--scores", "gen,gen+mds",
        "--data", f"later={folder / 'later.parquet'}", "--corrupt", "noise,missing",
    )  # fmt: skip
    assert done.code == 0, done.err
    for text in (
        "2 re-splits, ranked by nll",
        "gaussian + svs *",
        "changes the model's answer",
        "held-out classes",
        "locked rows, which chose nothing",
        "the same on further rows, where nothing is promised",
        "missing 3",
        f"recommended: hedged fit {arguments[1]} --data ",
        "because",
    ):
        assert text in done.out, text
    found = Comparison.model_validate_json((tmp_path / "out" / "comparison.json").read_text())
    with (tmp_path / "out" / "modules.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["module"] for line in lines] == [s.method for s in found.standings]
    assert set(found.standings[0].others) == {"later", "noise 3", "missing 3"}
    # What is recommended is a command that runs.
    (line,) = [text for text in done.out.splitlines() if text.startswith("recommended: ")]
    words = shlex.split(line.removeprefix("recommended: hedged "))
    for k, v in found.recommendation.options.items():
        assert v == words[words.index(f"--{k}") + 1]
    assert words[-2:] == ["-o", "bundle"]
    fitted = call(*words[:-1], tmp_path / "bundle", "--cache", folder / "cache")
    assert fitted.code == 0, fitted.err


def test_json_is_one_document(call: Call, arguments: list[object]) -> None:
    done = call(*arguments, "--methods", "laplace_diag", "--scaling", "temperature",
                "--scores", "none", "--by", "brier", "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = Comparison.model_validate(done.json)
    assert found.by == "brier" and found.scores == ()
    assert {s.name for s in found.standings} == {"none", "laplace_diag"}


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--splits", "1"], 2, "--splits"),
        (["--prediction", "both"], 2, "--prediction is frozen or module, not both"),
        (["--ood-data", "rows.parquet"], 2, "--ood-data takes name=value"),
        (["--methods", "lapalce"], 1, "lapalce cannot be compared here"),
        (["--by", "crps"], 1, "--by crps does not rank a classification"),
        (["--scores", "foo"], 1, "unknown module or score 'foo'"),
        (["--scores", "laplace"], 1, "laplace is a module and no score"),
        (["--conformal", "cqr"], 1, "unknown conformal method 'cqr'"),
        (["--corrupt", "rain"], 1, "no corruption of tables is called 'rain'"),
    ],
)
def test_wrong_usage(
    call: Call, arguments: list[object], more: list[str], code: int, text: str
) -> None:
    done = call(*arguments, *more)
    if code == 1:
        assert_one_line(done, text)
    else:
        assert (done.code, done.out) == (2, "") and text in " ".join(done.err.split())
