"""The command line as a user meets it: what it prints where, its exit codes, its four sources of
settings. Most commands run through ``hedged.cli.main`` in this process, some as processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

import hedged
from calibration.bundle import MANIFEST, load_bundle, sha256
from calibration.evaluation import Evaluation
from calibration.predictor import Predictor
from hedged import cli
from posthoc import registry
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
    verified = call("verify", bundle)
    assert verified.code == 0
    assert "golden rows reproduce" in verified.out.replace("\n", " ")
    as_json = call("inspect", bundle, "--json")
    assert as_json.json["identity"] == load_bundle(bundle).identity
    assert call("verify", bundle, "--json").json == {
        "ok": True,
        "identity": load_bundle(bundle).identity,
        "files": len(as_json.json["files"]),
    }


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


def test_help_and_version(call: Call) -> None:
    assert call("--version").out.strip() == hedged.__version__
    text = call("--help")
    assert text.code == 0
    for command in cli.app.registered_commands:
        assert str(command.name) in text.out
        assert call(command.name, "--help").code == 0


# Errors


def assert_one_line(done: Result, text: str, code: int = 1) -> None:
    """An error that a user can mend: nothing on stdout, one line of ours on stderr."""
    assert done.code == code
    assert done.out == ""
    own = [line for line in done.err.splitlines() if line.startswith("hedged: ")]
    assert len(own) == 1 and text in own[0], done.err
    assert "Traceback" not in done.err


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


# Flag > environment > file > default


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], list[object]]:
    """The arguments that name a configuration of the given text."""

    def config(text: str) -> list[object]:
        (tmp_path / "hedged.toml").write_text(text)
        return ["--config", tmp_path / "hedged.toml"]

    return config


def test_flag_before_environment_before_file_before_default(
    call: Call,
    fit_arguments: list[object],
    config: Callable[[str], list[object]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def method(*before: object, after: tuple[object, ...] = ()) -> tuple[str, int, str]:
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        done = call(*before, *fit_arguments, *after, "--json")
        assert done.code == 0, done.err
        found = done.json
        return found["module"]["name"], found["splits"]["seed"], found["conformal"]["method"]

    assert method() == ("laplace", 0, "lac")
    file = config('[fit]\nmethod = "none"\nseed = 5\nconformal = "raps"\n')
    assert method(*file) == ("none", 5, "raps")
    monkeypatch.setenv("HEDGED_FIT_METHOD", "laplace")
    monkeypatch.setenv("HEDGED_FIT_SEED", "6")
    assert method(*file) == ("laplace", 6, "raps")
    assert method(*file, after=("--seed", "7")) == ("laplace", 7, "raps")
    monkeypatch.setenv("HEDGED_CONFIG", str(file[1]))
    assert method() == ("laplace", 6, "raps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fit]\nmetod = 'none'\n", "hedged fit has no option 'metod'; it has"),
        ("[fitt]\nmethod = 'none'\n", "no command 'fitt'; demo, fit"),
        ("method = 'none'\n", "no command 'method'"),
        ("[fit\n", "hedged.toml"),
    ],
)
def test_a_file_with_unknown_keys_is_refused(
    call: Call, config: Callable[[str], list[object]], text: str, message: str
) -> None:
    assert_one_line(call(*config(text), "modules"), message)


def test_a_file_that_is_not_there(call: Call, tmp_path: Path) -> None:
    assert_one_line(call("--config", tmp_path / "none.toml", "modules"), "none.toml")


def test_a_wrong_value_in_the_environment_is_wrong_usage(
    call: Call, fit_arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEDGED_FIT_SEED", "many")
    done = call(*fit_arguments)
    assert (done.code, done.out) == (2, "") and "--seed" in done.err


# As processes


def process(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hedged", *map(str, arguments)],
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(**environ: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    return kept | environ


def test_a_process_keeps_stdout_for_json(
    fit_arguments: list[object], folder: Path, tmp_path: Path
) -> None:
    done = process(*fit_arguments, "--json", HEDGED_FIT_METHOD="none")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["module"]["name"] == "none"
    wrong = process("verify", folder)
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.splitlines() == [
        f"hedged: {folder}: manifest.json cannot be read (No such file or directory)"
    ]
    script = Path(sys.executable).with_name("hedged")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == hedged.__version__


def test_a_server_starts_beside_variables_of_other_commands(
    classification_bundle: Path, tmp_path: Path
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (tmp_path / "hedged.toml").write_text("[fit]\nseed = 1\n")
    others = {
        "HEDGED_FIT_METHOD": "none",
        "HEDGED_SCORE_BATCH_SIZE": "64",
        "HEDGED_EVALUATE_OUT": "elsewhere",
        "HEDGED_CONFIG": str(tmp_path / "hedged.toml"),
    }
    own = {"HEDGED_DATA_DIR": str(tmp_path), "HEDGED_PORT": str(port), "HEDGED_MAX_ROWS": "3"}
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "hedged", "serve", str(classification_bundle)],
        env=environment(**others, **own),
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while not ready(url):
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
        rows = [dict.fromkeys("abcd", 0.5)] * 4
        answer = post(f"{url}/v1/predict", {"rows": rows[:3]})
        assert len(answer["predictions"]) == 3
        with pytest.raises(urllib.error.HTTPError) as refused:  # the setting that has no flag holds
            post(f"{url}/v1/predict", {"rows": rows})
        assert 400 <= refused.value.code < 500
        refused.value.close()
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as e:
        e.close()
        return False
    except OSError:
        return False


def post(url: str, body: object) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_a_server_still_refuses_a_misspelt_setting(
    classification_bundle: Path, tmp_path: Path
) -> None:
    done = process(
        "serve", classification_bundle, HEDGED_MAX_RWOS="5", HEDGED_DATA_DIR=str(tmp_path)
    )
    assert done.returncode == 1
    assert done.stderr.startswith("hedged: unknown setting HEDGED_MAX_RWOS; known are ")


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--port", "70000"], "HEDGED_PORT"), (["--device", "tpu"], "HEDGED_")]
)
def test_a_server_names_a_setting_out_of_range(
    classification_bundle: Path, tmp_path: Path, arguments: list[str], name: str
) -> None:
    done = process("serve", classification_bundle, *arguments, HEDGED_DATA_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("hedged: ") and name in done.stderr
    assert len(done.stderr.splitlines()) == 1
