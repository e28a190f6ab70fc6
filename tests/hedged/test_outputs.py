"""``--outputs`` in place of a model: fitted, compared, evaluated, and refused where it says two
things at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calibration.bundle import load_bundle
from tests.calibration.test_answers import FEATURES, LOGITS, table
from tests.factory import CLASSES
from tests.hedged.conftest import Call

CHOSEN = ("--outputs", ",".join(LOGITS), "--features", ",".join(FEATURES))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    table(folder / "fresh.parquet", "classification", 300, seed=9)
    return table(folder / "rows.parquet", "classification", 1500)


def asked(rows: Path) -> list[object]:
    names = rows.parent / "names.txt"
    names.write_text("\n".join(CLASSES))
    return [
        "--data", rows, "--task", "classification", "--target", "target", "--classes", names,
        "--cache", rows.parent / "cache",
    ]  # fmt: skip


def test_columns_are_fitted_evaluated_and_scored(call: Call, rows: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = call("fit", *asked(rows), *CHOSEN, "--name", "them", "-o", bundle)
    assert done.code == 0, done.err
    manifest = load_bundle(bundle).manifest
    assert manifest.module.name == "none" and manifest.name == "them"
    assert dict(manifest.mapping.inputs) == {"z": tuple(LOGITS), "phi": tuple(FEATURES)}
    fresh = rows.parent / "fresh.parquet"
    evaluated = call("evaluate", bundle, "--data", fresh, "--json", "-o", tmp_path / "report")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["n"] == 300
    scored = call("score", bundle, fresh, tmp_path / "scored", "--json")
    assert scored.code == 0, scored.err
    assert scored.json["rows"] == 300


def test_columns_are_compared(call: Call, rows: Path, tmp_path: Path) -> None:
    done = call(
        "compare", *asked(rows), *CHOSEN, "--methods", "none,loss", "--splits", "2",
        "-o", tmp_path / "comparison", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {"none", "loss"} <= {s["name"].split()[0] for s in done.json["standings"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a MODEL, or --outputs"),
        (("model.onnx", *CHOSEN), "not both"),
        (("model.onnx", "--features", "a"), "--features goes with --outputs"),
        ((*CHOSEN, "--inputs", "z=a"), "leave --inputs"),
    ],
)
def test_two_things_at_once_are_refused(
    call: Call, rows: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    for command in ("fit", "compare"):
        done = call(command, *words, *asked(rows), "-o", out)
        assert done.code == 2 and message in " ".join(done.err.replace("│", " ").split()), done.err
    shutil.rmtree(out, ignore_errors=True)
