"""``hedged evaluate`` over several sets: how they are named, what is written, how errors read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer

import hedged
from calibration.evaluation import Evaluation
from hedged.commands.evaluate import named_sets
from tests import factory
from tests.hedged.conftest import Call, assert_one_line


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factory.data(tmp_path_factory.mktemp("fresh") / "fresh.parquet", n=150, seed=90)


def test_sets_and_corruptions_are_written_and_shown(
    call: Call, classification_bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    other = factory.data(tmp_path / "other.parquet", n=120, seed=91)
    arguments = [
        "evaluate", classification_bundle, "--data", f"clean={fresh}",
        "--data", f"shifted={other}", "--corrupt", "noise, missing", "--severity", "2",
        "-o", tmp_path / "out",
    ]  # fmt: skip
    done = call(*arguments, "--json")
    assert done.code == 0, done.err
    found = Evaluation.model_validate(done.json)
    assert [s.name for s in found.sets] == ["clean", "shifted", "noise 2", "missing 2"]
    assert found.n == 150
    assert Evaluation.model_validate_json((tmp_path / "out/evaluation.json").read_text()) == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sets side by side" in page and "Under corruption" in page
    shown = call(*arguments)
    assert shown.code == 0
    for text in ("sets side by side", "shifted", "missing 2", "promised for rows like those"):
        assert text in shown.out
    again = hedged.evaluate(
        classification_bundle,
        {"clean": fresh, "shifted": other},
        corrupt=["noise", "missing"],
        severities=[2],
    )
    assert again == found


def test_a_path_with_an_equals_sign_is_a_path(
    call: Call, classification_bundle: Path, fresh: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(fresh, "day=3.parquet")
    done = call("evaluate", classification_bundle, "--data", "day=3.parquet", "--json")
    assert done.code == 0, done.err
    assert done.json["n"] == 150 and done.json["sets"] == []
    assert named_sets(["day=3.parquet"]) == {"data": "day=3.parquet"}
    assert named_sets(["a=day=3.parquet"]) == {"a": "day=3.parquet"}
    assert named_sets(["x/day=3.parquet"]) == {"data": "x/day=3.parquet"}
    assert named_sets(["s3://b/k?v=1", "b=s3://b/k"]) == {"data": "s3://b/k?v=1", "b": "s3://b/k"}


@pytest.mark.parametrize("values", [["a.parquet", "b.parquet"], ["x=a", "x=b"], ["x="], ["=a"]])
def test_sets_that_cannot_be_told_apart_are_a_usage_error(values: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        named_sets(values)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--corrupt", "blur"], "is called 'blur'; there are missing, noise, scaled, shuffled"),
        (["--corrupt", "noise", "--severity", "6"], "severity 6 is none of 1, 2, 3, 4 and 5"),
    ],
)
def test_corruptions_that_do_not_fit_are_one_line(
    call: Call, classification_bundle: Path, fresh: Path, more: list[str], message: str
) -> None:
    assert_one_line(call("evaluate", classification_bundle, "--data", fresh, *more), message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--severity", "2"], "--severity belongs to --corrupt"),
        (["--corrupt", "all", "--severity", "hard"], "numbers like 1,3,5, not 'hard'"),
        (["--data", "again.parquet"], "two sets are called 'data'"),
    ],
)
def test_wrong_usage_says_what_is_right(
    call: Call, classification_bundle: Path, fresh: Path, more: list[str], message: str
) -> None:
    done = call("evaluate", classification_bundle, "--data", fresh, *more)
    assert done.code == 2 and message in " ".join(done.err.split())


def test_a_file_of_defaults_names_one_set_or_several(
    call: Call, classification_bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    for text, names in (
        (f"data = {str(fresh)!r}", []),
        (f"data = ['a={fresh}', 'b={fresh}']", ["a", "b"]),
    ):
        (tmp_path / "hedged.toml").write_text(f"[evaluate]\n{text}\n")
        done = call(
            "--config", tmp_path / "hedged.toml", "evaluate", classification_bundle,
            "-o", tmp_path / "out", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert [s["name"] for s in done.json["sets"]] == names
