"""The command line: what each command prints and leaves, and how each error reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import hedged
from calibration.bundle import MANIFEST, MemoryRecord, load_bundle, sha256
from calibration.evaluation import Evaluation
from calibration.predictor import Predictor
from hedged import cli
from hedged.commands.describe import describe
from posthoc import registry
from tests import factory
from tests.hedged.conftest import Call, assert_one_line

# Commands


def test_fit_prints_the_manifest_as_json(
    call: Call, fit_arguments: list[object], tmp_path: Path
) -> None:
    done = call(
        *fit_arguments, "--json", "--alpha", ".2,.1", "--conformal", "raps", "--seed", "3",
        "--name", "mine", "--version", "2.1", "--id", "id", "--split", ".25,.25,.25,.25",
        "--max-error", "0", "--ood", "gen",
    )  # fmt: skip
    assert done.code == 0, done.err
    written = (tmp_path / "bundle" / MANIFEST).read_bytes()
    assert done.json == json.loads(written) | {"identity": sha256(written)}
    m = load_bundle(tmp_path / "bundle").manifest
    assert (m.name, m.version, m.conformal.method, m.splits.seed) == ("mine", "2.1", "raps", 3)
    assert m.alphas == (0.2, 0.1) and m.classes == ("a", "b", "c") and m.mapping.id == "id"
    assert m.ood is not None and m.ood.score.name == "gen" and m.abstain is None
    assert max(m.splits.rows.values()) < 1.3 * min(m.splits.rows.values())


def test_fit_inspect_and_verify_for_a_person(
    call: Call, fit_arguments: list[object], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    fitted = call(*fit_arguments)
    assert fitted.code == 0, fitted.err
    for text in ("laplace", "covers the truth", "≥ 0.9", "hedged", "accuracy"):
        assert text in fitted.out
    inspected = call("inspect", bundle)
    assert (inspected.code, inspected.out) == (0, fitted.out)
    assert "over all calibrations, this one's between" in inspected.out
    verified = call("verify", bundle)
    assert verified.code == 0
    assert "golden rows reproduce" in " ".join(verified.out.split())
    as_json = call("inspect", bundle, "--json")
    assert as_json.json["identity"] == load_bundle(bundle).identity
    assert call("verify", bundle, "--json").json == {
        "ok": True,
        "identity": load_bundle(bundle).identity,
        "files": len(as_json.json["files"]),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "5"], "--samples belongs to --weights"),
        (["--curvature", "kron"], "--curvature belongs to --weights"),
        (["--weights", "all", "--method", "laplace"], "in place of --method laplace"),
        (["--import-laplace", "x.pt", "--method", "laplace"], "in place of --method"),
        (["--import-laplace", "x.pt", "--weights", "all"], "in place of --method"),
        (["--prior-precision", "1", "--set", "prior_precision=2"], "the same twice"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_fit_refuses_options_that_would_be_ignored(
    call: Call, fit_arguments: list[object], options: list[str], message: str
) -> None:
    done = call(*fit_arguments, *options)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_verify_says_which_file_was_changed(
    call: Call, classification_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(classification_bundle, tmp_path / "copy"))
    with (copy / "head.onnx").open("ab") as f:
        f.write(b" ")
    done = call("verify", copy, "--json")
    assert_one_line(done, "head.onnx was changed")


def test_evaluate_prints_and_writes_the_same_figures(
    call: Call, classification_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    arguments = [
        "evaluate", classification_bundle, "--data", folder / "fresh.parquet",
        "--ood-data", f"same={folder / 'data.parquet'}", "-o", tmp_path / "out",
    ]  # fmt: skip
    done = call(*arguments, "--json")
    assert done.code == 0, done.err
    found = Evaluation.model_validate(done.json)
    assert found.n == 200 and {o.out for o in found.ood} == {"same"}
    written = (tmp_path / "out" / "evaluation.json").read_text()
    assert Evaluation.model_validate_json(written) == found
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    shown = call(*arguments)
    assert shown.code == 0
    for text in ("temperature scaled", "coverage", "AUROC", "report.html"):
        assert text in shown.out


def test_score_writes_a_row_for_each_row(
    call: Call, classification_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scored"
    arguments = ["score", classification_bundle, folder / "fresh.parquet", out, "--json"]
    done = call(*arguments, "--alpha", ".05", "--passthrough", "target", "--batch-size", "50")
    assert done.code == 0, done.err
    assert done.json["good"] == 200 and done.json["errors"] == 0
    scored = pq.read_table(next(out.glob("*.parquet")))
    assert scored.num_rows == 200
    x, y = factory.rows("classification", 200, 8)
    predictor = Predictor(classification_bundle)
    want = predictor.run({"x": x[:50]}, q_hat=predictor.q_hat(0.05))
    np.testing.assert_array_equal(scored["set_size"].to_numpy()[:50], want["set_size"])
    assert scored["target"].to_pylist() == [factory.CLASSES[i] for i in y]
    other = call(*arguments)
    assert_one_line(other, "another run")
    again = call(*arguments, "--overwrite")
    assert again.code == 0 and again.json["resumed"] == 0


def test_a_graph_that_is_large_inside_says_so(
    classification_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = load_bundle(classification_bundle)
    for row_bytes, told in ((200_000_000, True), (2_000_000, False)):
        memory = MemoryRecord(row_bytes=row_bytes, values=4)
        manifest = bundle.manifest.model_copy(update={"memory": memory})
        describe(dataclasses.replace(bundle, manifest=manifest))
        line = "memory: a row takes about 200 MB inside; a run has at most 2 of them"
        assert (line in capsys.readouterr().out) is told


def test_modules_is_the_registry(call: Call) -> None:
    done = call("modules", "--json")
    names = [*registry.MODULES, *registry.SCORES]
    assert [m["name"] for m in done.json] == names
    for record in done.json:
        info = registry.info(record["name"])
        assert record["needs"] == sorted(info.needs)
        assert record["paper"]["url"] == info.paper.url
    shown = call("modules").out
    assert all(name in shown for name in names)
    short = call("modules", "--short")
    assert [line.split()[0] for line in short.out.splitlines() if line[:1].strip()] == [
        *("modules", *registry.MODULES, "scores", *registry.SCORES)
    ]
    named = [registry.info(name) for name in names]
    assert call("modules", "--short", "--json").json == [
        {"name": i.name, "kind": i.kind, "summary": i.summary} for i in named
    ]
    assert call("modules", "knn", "--short").out.split()[:2] == ["scores", "knn"]


def test_help_and_version(call: Call) -> None:
    assert call("--version").out.strip() == hedged.__version__
    text = call("--help")
    assert text.code == 0
    for command in cli.app.registered_commands:
        assert str(command.name) in text.out
        assert call(command.name, "--help").code == 0


# Errors


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--method", "laplacee"], "unknown module or score 'laplacee'"),
        (["--target", "nope"], "no column 'nope'"),
        (["--ood", "nope"], "unknown module or score 'nope'"),
        (["--head", "nope"], "nope"),
        (["--output", "nope"], "no output 'nope'; it has y"),
        (["--max-cache", "1e-9", "--batch-size", "64"], "raise --max-cache"),
        (["--data", "nowhere.parquet"], "nowhere.parquet"),
        (["--alpha", "1.5"], "between 0 and 1"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    call: Call, fit_arguments: list[object], tmp_path: Path, more: list[str], text: str
) -> None:
    assert_one_line(call(*fit_arguments, *more, "--json"), text)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_is_never_overwritten(
    call: Call, fit_arguments: list[object], classification_bundle: Path
) -> None:
    before = load_bundle(classification_bundle).identity
    assert_one_line(call(*fit_arguments[:-1], classification_bundle), "exists already")
    assert load_bundle(classification_bundle).identity == before


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_no_bundle(call: Call, tmp_path: Path, command: str) -> None:
    assert_one_line(call(command, tmp_path / "none"), "no such folder")
    assert_one_line(call(command, tmp_path), "manifest.json cannot be read")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--task", "ranking"], "--task"),
        (["--alpha", "a"], "--alpha takes numbers"),
        (["--split", ".5,.5"], "--split takes four"),
        (["--split", ".5,.5,.5,.5"], "--split takes four"),
        (["--inputs", "x"], "--inputs takes name=value"),
        (["--classes", "nowhere.txt"], "nowhere.txt"),
        (["--ood-alpha", "0"], "--ood-alpha"),
        (["--max-error", "1"], "--max-error"),
        (["--task", "regression", "--max-error", ".1"], "needs --tolerance"),
        (["--seed", "x"], "--seed"),
        (["--metod", "none"], "--metod"),
    ],
)
def test_wrong_usage_is_two(
    call: Call, fit_arguments: list[object], tmp_path: Path, more: list[str], text: str
) -> None:
    done = call(*fit_arguments, *more)
    assert (done.code, done.out) == (2, "")
    assert text in done.err
    assert not (tmp_path / "bundle").exists()


def test_missing_options_and_unknown_commands_are_two(call: Call, folder: Path) -> None:
    for arguments in (["fit", folder / "model.onnx"], ["fitt"], ["inspect"], ["score", "a"]):
        done = call(*arguments)
        assert (done.code, done.out) == (2, ""), arguments
        assert "Usage: hedged" in done.err
